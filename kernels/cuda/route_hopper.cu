// DashAttention's router for bf16 queries on Hopper, forward: any number of chunks, every alpha.
//
// A thread block takes items: neighbouring queries of one kv head, 64 / g for each of its three
// warpgroups. Tiles of 64 summaries go through a ring of stages, which all three share:
//
//   sweep: z -> what is within 1 of a row's largest entry may be in its support: a list of 96 in
//          shared memory, with the chunks
//   lists -> Newton's steps -> thresholds (4 lanes a row, which keep the first 64 in registers)
//   lists -> p, summed head by head over a window of 384 chunks in shared memory -> w, mask, bias
//          (a warp a query, lanes first along a list, then along the chunks: a ballot makes half a
//          word of the mask, stores are whole lines)
//
// A list holds all of its row's support, off which p is 0, so one sweep does. Where a list is full,
// its own threshold drops what has left the support. Where even the support is too long, a
// warpgroup sweeps again, once for each of Newton's steps, and once more, z -> p, registers -> a
// tile in shared memory -> w; the latter also for alpha = 1, whose support is everything. Sweep by
// sweep a warpgroup says whether it wants another; those who do not pass over it.
//
// Registers: queries in f16 (32 where D = 128) and z (32), 157 with all else. Queries' are free for
// others once the first sweep is over, and who sweeps again copies them anew: nothing is spilled.
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64: 6.7e7 pairs of a row and a candidate,
// 2 D operations in each of two parts: 3.4e10, 35 us at 989 TFLOP/s; beside it 0.13 GB of queries,
// 45 us, summaries from L2, 2731 items of 2.5 tiles of 32 KB, 0.22 GB, 40 us, and 34 MB of bias,
// 11 us; about 12 other operations a pair, 30 us beside all.
//
// What takes the time is latency, not these: three warps for each scheduler issued in 47 % of
// cycles where all tiles were swept twice, 6160 instructions a warp and item, 29 % of them in the
// second sweep, 21 % in Newton's steps of one row after the other; 464 us, and 518 us once
// registers were spilled. Without the second sweep 3900 instructions and 300 us were expected; it
// takes 390.
#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/route_hopper_queries.cuh"
#include "kernels/cuda/route_hopper_thresholds.cuh"

namespace entrain::cuda {
namespace {

constexpr int groups = 3, threads = (groups + 1) * warpgroup;  // one more copies

/// high and low are 16-bit patterns of f16. A thread takes two neighbouring elements.
__global__ void __launch_bounds__(256)
    prepare(const Rows<double> kbar, int64_t H, int64_t M, int D, int64_t pairs, uint32_t* high,
            uint32_t* low, uint32_t* rounded) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= pairs) return;
  const int64_t row = x / (D / 2), d = x % (D / 2) * 2;
  const double* from = kbar.at(row / M / H, row / M % H, row % M) + d;
  const auto a = static_cast<float>(from[0]), b = static_cast<float>(from[1]);
  const __half2 top = __floats2half2_rn(summary_scale * a, summary_scale * b);
  const float2 taken = __half22float2(top);
  const __half2 rest = __floats2half2_rn(summary_scale * a - taken.x, summary_scale * b - taken.y);
  high[x] = *reinterpret_cast<const uint32_t*>(&top);
  low[x] = *reinterpret_cast<const uint32_t*>(&rest);
  rounded[x] = pack(a, b);
}

/// Shared memory: a space for each warpgroup, which holds its rows of q, then its lists and sums,
/// then perhaps two tiles of p beside the ends of its lists; the stages; barriers; what warpgroups
/// want.
template <int D>
struct Layout {
  static constexpr int space_bytes = (HeadLists::bytes + 1023) / 1024 * 1024;
  static constexpr int stages = D == 64 ? 6 : 3, stage_bytes = 2 * D / 64 * panel_bytes;
  static constexpr int stages_at = groups * space_bytes;
  static constexpr int barriers_at = stages_at + stages * stage_bytes;
  static constexpr int own = 2 * stages, agreed = own + groups, barriers = agreed + 1;
  static constexpr int wants_at = barriers_at + 8 * barriers;
  static constexpr int shared_bytes = 1024 + wants_at + 2 * 4 * groups;
  static_assert(HeadLists::ends_at >= 2 * RowTile::bytes &&
                HeadLists::ends_at >= D / 64 * panel_bytes);
};

/// How warpgroups and the warp that copies agree on sweeps after the first: each phase of a barrier
/// says who wants one more. Two phases' answers are kept: nobody is more than one ahead.
template <int groups>
class Agreement {
 public:
  static constexpr int arrivals = 4 * groups + 1;  // warps

  __device__ Agreement(uint32_t barrier, volatile int* wants) : barrier_(barrier), wants_(wants) {}
  /// By a warpgroup's threads.
  __device__ void announce(int group, bool wants) {
    if (threadIdx.x % warpgroup == 0) wants_[phase_ * groups + group] = wants;
    warp_arrive(barrier_);
  }
  /// By the thread that copies.
  __device__ void attend() const { barrier_arrive(barrier_); }
  __device__ bool another() {
    barrier_wait(barrier_, phase_);
    bool any = false;
#pragma unroll
    for (int i = 0; i < groups; ++i) any = wants_[phase_ * groups + i] != 0 || any;
    phase_ ^= 1;
    return any;
  }

 private:
  const uint32_t barrier_;
  volatile int* const wants_;  // [2, groups]
  uint32_t phase_ = 0;
};

/// The warp that copies summaries ahead.
template <int D>
__device__ void copy_summaries(const CUtensorMap& high, const CUtensorMap& low,
                               const HopperRoute& p, double* read, uint32_t stages,
                               Ring<Layout<D>::stages> ring, Agreement<groups> agreement) {
  for_items(p.items(groups), [&](int index) {
    const RouteItem item = p.item(index, groups);
    if (read) count_reads(p, item, groups * p.queries, read);
    if (threadIdx.x % 32 != 0 || item.begin == item.end) return;
    auto sweep = [&] {
      for (int tile = item.begin; tile < item.end; ++tile) {
        ring.wait_empty();
        copy_tile<D>(stages + ring.stage * Layout<D>::stage_bytes, high, low, ring.full(), item,
                     tile);
        ring.next();
      }
    };
    do {
      sweep();
      agreement.attend();
    } while (agreement.another());
  });
}

/// One of the warpgroups that route.
template <int D, Curve curve>
__device__ void route_rows(const CUtensorMap& q, const HopperRoute& p, const HopperRouteOutput& out,
                           const FloatEntmax<curve>& entmax, char* memory,
                           Ring<Layout<D>::stages> ring, Agreement<groups> agreement) {
  using Shape = Layout<D>;
  const int thread = static_cast<int>(threadIdx.x) % warpgroup, warp = uniform(thread / 32);
  const int group = uniform(static_cast<int>(threadIdx.x) / warpgroup), meeting = 1 + group;
  char* const space = memory + group * Shape::space_bytes;
  const HeadLists lists{space};
  const Block own_block{shared_address(space)};
  const uint32_t own = ring.barriers + 8 * (Shape::own + group);
  const uint32_t stages = shared_address(memory) + Shape::stages_at;
  uint32_t own_phase = 0;
  RouteRows<D> rows(p);
  for_items(p.items(groups), [&](int index) {
    const RouteItem item = p.item(index, groups);
    const int first = item.first + group * p.queries, count = max(0, min(p.queries, p.N - first));
    const int end = count > 0 ? p.end_tile(first + count - 1) : item.begin;

    // In the place of what the warpgroup has had there.
    auto take_rows = [&] {
      show_to_engines();
      warpgroup_sync(meeting);
      if (thread == 0) copy_rows<D>(own_block, q, own, p, item, first);
      barrier_wait(own, own_phase);
      own_phase ^= 1;
      rows.load(own_block);
      warpgroup_sync(meeting);
    };
    rows.place(p, first, count);
    take_rows();

    // Calls f(z, tile) for tiles with candidates.
    auto sweep = [&](auto f) {
      for (int tile = item.begin; tile < item.end; ++tile) {
        float z[8][4];
        ring.wait_full();
        if (tile < end) rows.multiply(z, stages + uniform(ring.stage) * Shape::stage_bytes);
        warp_arrive(ring.empty(ring.stage));
        ring.next();
        if (tile >= end) continue;
        rows.scale(z, tile);
        f(z, tile);
      }
    };
    auto pass = [&] {  // a sweep that others want
      for (int tile = item.begin; tile < item.end; ++tile) {
        ring.wait_full();
        warp_arrive(ring.empty(ring.stage));
        ring.next();
      }
    };

    Thresholds<curve> found(entmax, lists.rows(warp));
    sweep([&](const float(&z)[8][4], int tile) { found.add(z, tile); });
    bool wants = item.begin < item.end;  // one more sweep
    if constexpr (found.keeps_lists) {
      const bool lost = warpgroup_any(meeting, found.lost[0] || found.lost[1]);
      wants = wants && (lost || p.M > RowLists::chunks);
    }
    if (item.begin < item.end) agreement.announce(group, wants);
    found.finish();
    // Those who take a query know the thresholds of its rows.
    auto settle = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float threshold = rows.routes(i) ? found.threshold[i] : 0;
        if (thread % 4 == 0) lists.end(rows.lane_row(i)) = {threshold, found.size(i)};
      }
      16 % p.g == 0 ? __syncwarp() : warpgroup_sync(meeting);
    };
    settle();
    Queries queries(p, out, item, first, count);
    queries.fill_outside(item.begin, end);
    if (wants) {
      take_rows();  // until here their registers were free for others
      bool moves[2] = {found.lost[0], found.lost[1]};
      for (int step = 0; step < entmax.most_steps; ++step) {
        if (!warpgroup_any(meeting, moves[0] || moves[1])) break;
        float f[2] = {0, 0}, df[2] = {0, 0};
        agreement.another();
        sweep([&](const float(&z)[8][4], int) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              entmax.add(z[j][e] - found.threshold[e / 2], f[e / 2], df[e / 2]);
            }
          }
        });
        agreement.announce(group, true);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          f[i] = Lanes(4).sum(f[i]);
          df[i] = Lanes(4).sum(df[i]);
          moves[i] = moves[i] && entmax.improve(found.threshold[i], f[i], df[i]);
        }
      }
      settle();
      agreement.another();
      sweep([&](float(&z)[8][4], int tile) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            z[j][e] = entmax.probability(z[j][e], found.threshold[e / 2]);
          }
        }
        const RowTile tile_of_p(space + tile % 2 * RowTile::bytes);
        tile_of_p.put(z);
        warpgroup_sync(meeting);
        queries.put_tile(tile_of_p, tile);
      });
      agreement.announce(group, false);
      queries.centre(item.begin, end);
    } else if constexpr (found.keeps_lists) {
      queries.put_lists(entmax, lists, item.begin, end);
    }
    while (item.begin < item.end && agreement.another()) {
      pass();
      agreement.announce(group, false);
    }
    queries.put_thresholds(lists, item, first);
  });
}

template <int D>
__global__ void __launch_bounds__(threads, 1)
    route(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap high,
          const __grid_constant__ CUtensorMap low, const __grid_constant__ HopperRoute p,
          const __grid_constant__ HopperRouteOutput out) {
#ifdef ENTRAIN_HOPPER
  using Shape = Layout<D>;
  const uint32_t at = shared_address(dynamic_shared());
  char* const memory = dynamic_shared() + ((at + 1023) / 1024 * 1024 - at);
  Ring<Shape::stages> ring{shared_address(memory) + Shape::barriers_at};
  const uint32_t agreed = ring.barriers + 8 * Shape::agreed;
  if (threadIdx.x == 0) {
    Ring<Shape::stages>::init(ring.barriers, 4 * groups);
    for (int i = 0; i < groups; ++i) barrier_init(ring.barriers + 8 * (Shape::own + i), 1);
    barrier_init(agreed, Agreement<groups>::arrivals);
    barrier_init_done();
  }
  __syncthreads();

  const Agreement<groups> agreement(agreed, reinterpret_cast<int*>(memory + Shape::wants_at));
  if (threadIdx.x / warpgroup == groups) {
    fewer_registers<32>();
    if (threadIdx.x % warpgroup >= 32) return;
    copy_summaries<D>(high, low, p, out.read, shared_address(memory) + Shape::stages_at, ring,
                      agreement);
    return;
  }
  more_registers<160>();
  by_curve(p.alpha_gamma[0], [&]<Curve curve>(const FloatEntmax<curve>& entmax) {
    route_rows<D>(q, p, out, entmax, memory, ring, agreement);
  });
#endif
}

}  // namespace

bool hopper_route_takes(const Tensor& q, const Tensor& kbar, const DashRouting& routing) {
  const int64_t D = q[3], g = kbar[1] > 0 ? q[1] / kbar[1] : 0;
  const int64_t steps = q.stride[0] | q.stride[1] | q.stride[2];
  return q.dtype == DType::bf16 && (D == 64 || D == 128) && g >= 1 && g <= block_rows &&
         routing.aggregation == Aggregation::entmax && q.stride[3] == 1 && steps % 8 == 0 &&
         reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && on_hopper();
}

HopperRoute hopper_route_problem(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                                 int64_t first) {
  const RouteShape s = route_shape_of(q, kbar, routing, first);
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  return {whole(s.B),
          whole(s.Hq),
          whole(s.Hkv),
          s.g,
          whole(s.N),
          whole(s.M),
          s.D,
          block_rows / s.g,
          whole(first),
          routing,
          on_device(routing.alpha_gamma, 2)};
}

Summaries prepare_summaries(const Tensor& kbar, const Tensor& scratch) {
  const int64_t n = kbar.numel();
  auto* parts = reinterpret_cast<bf16*>(pointer<double>(scratch));
  const auto part = [&](int i) {
    return Tensor::of(parts + i * n, kbar.shape, DType::bf16, Device::cuda);
  };
  const Summaries to{part(0), part(1), part(2)};
  const auto words = [](const Tensor& x) { return reinterpret_cast<uint32_t*>(x.data); };
  launch("route: prepare", prepare, ceil_div(n / 2, 256), 256, 0, Rows<double>(kbar), kbar[1],
         kbar[2], static_cast<int>(kbar[3]), n / 2, words(to.high), words(to.low),
         words(to.rounded));
  return to;
}

bool route_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                  const Tensor& tau, const BlockSet& blocks, const Tensor& weights,
                  const Tensor& scratch, const Tensor& read) {
  if (!hopper_route_takes(q, kbar, routing)) return false;
  const HopperRoute p = hopper_route_problem(q, kbar, routing, blocks.first);
  const Summaries summaries = prepare_summaries(kbar, scratch);
  const HopperRouteOutput out{pointer<double>(tau),
                              pointer<uint64_t>(blocks.mask),
                              static_cast<int>(blocks.mask[3]),
                              pointer<float>(blocks.bias),
                              pointer<float>(weights),
                              pointer<double>(read),
                              static_cast<float>(1 / routing.sigma)};
  by_dense_head_dim(p.D, [&](auto D) {
    launch("route", route<D>, std::min(p.items(groups), multiprocessors()), threads,
           Layout<D>::shared_bytes,
           packed_map(Rows<bf16>(q), p.B, p.Hq, p.N, p.D, p.g, block_rows / p.g),
           Summaries::map(summaries.high), Summaries::map(summaries.low), p, out);
  });
  return true;
}

}  // namespace entrain::cuda
