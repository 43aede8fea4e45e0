// The choice of blocks for bf16 queries on Hopper: selection.cu's mathematics in float, for any
// number of windows, whose scores are never kept.
//
// A row is a (query, head). A thread block takes items: neighbouring queries of one kv head, up to
// 64 / g for each of its three warpgroups. Tiles of 64 windows go through a ring of stages, which
// all three share, in two sweeps:
//
//   q [64 rows, D], registers, and keys [64 windows, D], shared --wgmma--> z [64 rows, 64 windows]
//   sweep 1: z -> each lane's largest score and sum of exponentials of its columns; a row's four
//            lanes bring them together at the end
//   sweep 2: z again, to the same bits -> p, registers -> a tile in shared memory -> sum over the
//            group's heads -> scores of blocks, f32 [queries, blocks], shared, for all of the item
//   choice:  a warp a query finds the lowest score to take bit by bit, and writes the mask
//
// Keys in bf16 (NSA's) are multiplied as they are. Keys in double (InfLLM-V2's, pooled) become two
// parts in f16, high + low = 32 key, with 22 bits; the query, in f16 as well, is exact between
// 2^-17 and 65504. Products are exact in float, so weights err by rounding of sums in float: 1e-6,
// and blocks whose scores are closer than that may be taken for each other.
//
// Registers: queries (32 where D = 128) and z (32). 8 bytes are spilled where D = 128 and keys are
// in two parts.
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 32768, windows of 32 every 16: 1.07e9 pairs of a row and a
// window; 2 D operations in each part and sweep: 5.5e11, 0.56 ms at 989 TFLOP/s, for bf16 keys,
// 1.1e12, 1.1 ms, for double; an exponential in each sweep: 0.58 ms at 16 a clock and
// multiprocessor, beside it; keys from L2: 5462 items of 16.5 tiles of 16 or 32 KB twice, 2.9 or
// 5.9 GB, 0.5 or 1.1 ms beside both. 1 and 2 ms were expected, where selection.cu took 51 and 42 ms
// on an H100. Measured, with pooling and NSA's gates: 3.0 and 3.1.
#include <cmath>

#include "kernels/cuda/selection_hopper.cuh"

namespace entrain::cuda {
namespace {

constexpr int groups = 3, threads = (groups + 1) * warpgroup;  // one more copies

/// Shared memory: for each warpgroup a space, which holds its rows of q, then tiles of p; the
/// stages; barriers; scores of blocks, f32 [groups, queries, blocks].
template <int D, int parts>
struct Layout {
  static constexpr int part_bytes = D / 64 * panel_bytes, stage_bytes = parts * part_bytes;
  static constexpr int stages = stage_bytes > 16384 ? 3 : 65536 / stage_bytes;
  static constexpr int stages_at = groups * RowTile::bytes;
  static constexpr int barriers_at = stages_at + stages * stage_bytes;
  static constexpr int own = 2 * stages, barriers = own + groups;
  static constexpr int scores_at = barriers_at + 8 * barriers;
  static_assert(RowTile::bytes % 1024 == 0 && RowTile::bytes >= part_bytes);

  static int64_t shared_bytes(int queries, int blocks) {
    return 1024 + scores_at + int64_t{4} * groups * queries * blocks;
  }
};

/// A warpgroup's rows of q as left operands; of keys in two parts, in f16.
template <int D, int parts>
class WindowRows {
 public:
  __device__ void load(Block block) {
    const int row = static_cast<int>(threadIdx.x) % warpgroup / 32 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      block.left(q_[step], row, step);
#pragma unroll
      for (int x = 0; x < 4 && parts == 2; ++x) {
        const uint32_t both = q_[step][x];
        const __half2 pair =
            __floats2half2_rn(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
        q_[step][x] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
  /// z = q . keys of a stage, the low part first. It may be written again on return.
  __device__ void multiply(float (&z)[8][4], uint32_t stage) const {
    products_fence();
#pragma unroll
    for (int x = 0; x < parts * D / 16; ++x) {
      const int part = parts - 1 - x / (D / 16), step = x % (D / 16);
      const uint64_t keys = Block{stage + part * Layout<D, parts>::part_bytes}.rows(step);
      if constexpr (parts == 1) {
        product<false>(z, q_[step], keys, x > 0);
      } else {
        product_f16(z, q_[step], keys, x > 0);
      }
    }
    products_commit();
    products_wait<0>();
    pin(z);
  }

 private:
  Fragment q_[D / 16];
};

/// The warp that copies windows ahead, and counts what is read.
template <int D, int parts>
__device__ void copy_windows(const CUtensorMap& high, const CUtensorMap& low, const HopperSelect& p,
                             uint32_t stages, Ring<Layout<D, parts>::stages> ring) {
  using Shape = Layout<D, parts>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_items(p.items(groups), [&](int index) {
    const SelectItem item = p.item(index, groups);
    if (p.read) {
      int entries = 0;  // whole numbers: the order of adding them does not show
      const int end = min(item.first + groups * p.queries, p.N);
      for (int i = item.first + lane; i < end; i += 32) entries += p.seen(i);
      entries = __reduce_add_sync(0xffffffffu, entries);
      double* fields = p.read + item.r * read_fields;
      if (lane == 0) {
        atomicAdd(fields + read_router, static_cast<double>(entries));
        atomicAdd(fields + read_flops, static_cast<double>(int64_t{2} * entries * p.g * D));
      }
    }
    if (lane != 0) return;
    for (int x = 0; x < 2 * item.tiles; ++x) {
      const int row = x % item.tiles * tile_windows;
      const Block stage{stages + ring.stage * Shape::stage_bytes};
      ring.wait_empty();
      barrier_arrive_expecting(ring.full(), Shape::stage_bytes);
      copy_block<D>(stage, high, ring.full(), row, item.r, item.b);
      if constexpr (parts == 2) {
        copy_block<D>(Block{stage.address + Shape::part_bytes}, low, ring.full(), row, item.r,
                      item.b);
      }
      ring.next();
    }
  });
}

/// One of the warpgroups that choose.
template <int D, int parts>
__device__ void select_rows(const CUtensorMap& q, const HopperSelect& p, char* memory,
                            Ring<Layout<D, parts>::stages> ring) {
  using Shape = Layout<D, parts>;
  const auto thread = static_cast<int>(threadIdx.x);
  const int group = thread / warpgroup, meeting = 1 + group, warp = thread % warpgroup / 32;
  const RowTile space(memory + group * RowTile::bytes);
  const Block own_block{shared_address(space.at(0, 0))};
  float* const scores =
      reinterpret_cast<float*>(memory + Shape::scores_at) + group * p.queries * p.blocks;
  const uint32_t own = ring.barriers + 8 * (Shape::own + group);
  const uint32_t stages = shared_address(memory) + Shape::stages_at;
  const float factor = log2_e / ((parts == 2 ? summary_scale : 1) * sqrtf(D));
  // Where a warp's 16 rows are whole queries, it has its own; else the warpgroup shares them out.
  const bool whole = 16 % p.g == 0;
  const int share = whole ? 16 / p.g : (p.queries + 3) / 4;
  uint32_t own_phase = 0;
  WindowRows<D, parts> rows;
  for_items(p.items(groups), [&](int index) {
    const SelectItem item = p.item(index, groups);
    const int first = item.first + group * p.queries, count = max(0, min(p.queries, p.N - first));
    const int tiles = count > 0 ? p.tiles(first + count - 1) : 0;

    show_to_engines();
    warpgroup_sync(meeting);  // the last item is done with
    if (thread % warpgroup == 0) {
      barrier_arrive_expecting(own, D / 64 * p.queries * p.g * 128);
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        copy_panel(own_block.address + panel * panel_bytes, q, own, panel * 64, item.r * p.g, first,
                   item.b);
      }
    }
    QueryScores queries(p, scores, first, warp * share, max(0, min(share, count - warp * share)));
    int seen[2];  // by the lane's rows, windows
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = RouteRows<D>::lane_row(i) / p.g;
      seen[i] = query < count ? p.seen(first + query) : 0;
    }
    barrier_wait(own, own_phase);
    own_phase ^= 1;
    rows.load(own_block);
    warpgroup_sync(meeting);  // p takes the place of the rows

    // Calls f(z, tile) for tiles that some query sees.
    auto sweep = [&](auto f) {
      for (int tile = 0; tile < item.tiles; ++tile) {
        float z[8][4];
        ring.wait_full();
        if (tile < tiles) rows.multiply(z, stages + ring.stage * Shape::stage_bytes);
        warp_arrive(ring.empty(ring.stage));
        ring.next();
        if (tile < tiles) f(z, tile);
      }
    };
    RowSoftmax softmax(factor);
    sweep([&](float(&z)[8][4], int tile) {
      const int c0 = tile * tile_windows;
      if (!__all_sync(0xffffffffu, c0 + tile_windows <= min(seen[0], seen[1]))) {
        const int lane_c0 = c0 + thread % 4 * 2;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (lane_c0 + 8 * j + e % 2 >= seen[e / 2]) z[j][e] = -INFINITY;
          }
        }
      }
      softmax.add(z);
    });
    softmax.finish();
    sweep([&](float(&z)[8][4], int tile) {  // weights of windows not seen are not read
      const auto meet_rows = [&] { whole ? __syncwarp() : warpgroup_sync(meeting); };
      softmax.weigh(z);
      space.put(z);
      meet_rows();
      queries.add(space, tile);
      meet_rows();
    });
    queries.choose_blocks(item);
  });
}

template <int D, int parts>
__global__ void __launch_bounds__(threads, 1)
    select(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap high,
           const __grid_constant__ CUtensorMap low, const __grid_constant__ HopperSelect p) {
#ifdef ENTRAIN_HOPPER
  using Shape = Layout<D, parts>;
  const uint32_t at = shared_address(dynamic_shared());
  char* const memory = dynamic_shared() + ((at + 1023) / 1024 * 1024 - at);
  const Ring<Shape::stages> ring{shared_address(memory) + Shape::barriers_at};
  if (threadIdx.x == 0) {
    Ring<Shape::stages>::init(ring.barriers, 4 * groups);
    for (int i = 0; i < groups; ++i) barrier_init(ring.barriers + 8 * (Shape::own + i), 1);
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x / warpgroup == groups) {
    fewer_registers<32>();
    if (threadIdx.x % warpgroup >= 32) return;
    copy_windows<D, parts>(high, low, p, shared_address(memory) + Shape::stages_at, ring);
    return;
  }
  more_registers<160>();
  select_rows<D, parts>(q, p, memory, ring);
#endif
}

/// Whether it fits: fewer queries where the scores of all their blocks leave no room for more.
template <int D, int parts>
bool launch_select(const Tensor& q, const Tensor& keys, HopperSelect p, const Tensor& scratch) {
  using Shape = Layout<D, parts>;
  const int64_t room = SharedMemory::of_device().most - Shape::shared_bytes(0, 0);
  const int64_t fit = room / (Shape::shared_bytes(1, p.blocks) - Shape::shared_bytes(0, 0));
  p.queries = static_cast<int>(std::min<int64_t>(block_rows / p.g, fit));
  if (p.queries == 0) return false;
  const CUtensorMap rows = packed_map(Rows<bf16>(q), q[0], q[1], q[2], D, p.g, p.queries);
  const auto run = [&](const CUtensorMap& high, const CUtensorMap& low) {
    launch("select_blocks", select<D, parts>, std::min(p.items(groups), multiprocessors()), threads,
           static_cast<size_t>(Shape::shared_bytes(p.queries, p.blocks)), rows, high, low, p);
  };
  if constexpr (parts == 2) {
    const Summaries summaries = prepare_summaries(keys, scratch);
    run(Summaries::map(summaries.high), Summaries::map(summaries.low));
  } else {
    const CUtensorMap map = block_map(Rows<bf16>(keys), keys[0], keys[1], keys[2], D);
    run(map, map);
  }
  return true;
}

}  // namespace

bool select_hopper(const Tensor& q, const Tensor& keys, const BlockSelection& selection,
                   const BlockSet& blocks, const Tensor& scratch, const Tensor& read) {
  const AttentionProblem problem(q, keys, {.keys = selection.runs(), .first = blocks.first});
  const bool split = keys.dtype == DType::f64;
  const bool takes =
      split ? scratch && hopper_takes(problem, {q}) : hopper_takes(problem, {q, keys});
  // A few queries, as while decoding, do not fill its tiles.
  if (!takes || q[2] < 64 || keys[2] == 0 || problem.g > block_rows ||
      selection.block < selection.stride) {
    return false;
  }
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  const HopperSelect p{whole(problem.B),
                       whole(keys[1]),
                       whole(problem.g),
                       whole(problem.N),
                       whole(problem.first),
                       0,
                       whole(ceil_div(blocks.first + problem.N, selection.block)),
                       problem.sight,
                       selection,
                       reinterpret_cast<uint32_t*>(pointer<uint64_t>(blocks.mask)),
                       2 * blocks.mask[3],
                       pointer<double>(read)};
  bool fits = false;
  by_dense_head_dim(problem.D, [&](auto D) {
    fits = split ? launch_select<D, 2>(q, keys, p, scratch) : launch_select<D, 1>(q, keys, p, {});
  });
  return fits;
}

}  // namespace entrain::cuda
