// The way back through DashAttention's router on Hopper, first half: from D, the sums of dS, to
// gradients of the routing weights, dw, and of the queries.
//
// A thread block takes items: neighbouring queries of one kv head, 64 / g for each warpgroup. Tiles
// of 64 summaries go through a ring of stages, which the warpgroups share, once a sweep:
//
//   sweep 1: z -> the largest entry of a row, from which tau counts
//   sweep 2: z -> p, registers -> a tile in shared memory -> w -> x, scratch in L2: 1 / (sigma g
//            (w + eps)) on the support, 0 off it; of rows, the sums of s, s x and s x D
//   between: dw = x (D - mean D over the support), in D's place; centre = sum s dw / sum s
//   sweep 3: z, dw -> dz, bf16, registers -> dq += dz kbar, registers
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64: 6.7e7 pairs of a row and a candidate,
// 2 D operations for each in seven products: 1.2e11, 0.12 ms at 989 TFLOP/s; summaries from L2,
// 4096 items of 2.5 tiles of 32, 32 and 48 KB: 1.1 GB, 0.2 ms; about 50 other operations a pair,
// 0.1 ms beside both.
//
// It took about 600 us when each tile's D and dw, tau and dq were waited for where they are needed,
// eight warps having little else to do. All are asked for a tile or a sweep ahead, but for D where
// g = 1, whose table has no room for two tiles. That was to leave 520 us; an H100 still takes about
// 640. Where D = 64, rows of dq waiting in registers make a few words spill, of which a tile takes
// one.
#include <cmath>

#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct QueryHalf {
  static constexpr int groups = D == 64 ? 3 : 2, threads = (groups + 1) * warpgroup;
  static constexpr int block_bytes = D / 64 * panel_bytes, stage_bytes = 2 * block_bytes;
  static constexpr int stages = D == 64 ? 5 : 3;
  // The warpgroups' rows, stages, two tables of each, means of D, barriers.
  static constexpr int stages_at = groups * block_bytes;
  static constexpr int tables_at = stages_at + stages * stage_bytes;
  static constexpr int means_at = tables_at + groups * 2 * RowTile::bytes;
  static constexpr int barriers_at = means_at + groups * block_rows * 4;
  static constexpr int shared_bytes = 1024 + barriers_at + 8 * (2 * stages + 2 * groups);

  /// Of the warpgroup's own rows, behind those of the stages.
  __device__ static Ring<1> own(uint32_t barriers, int group) {
    return {barriers + 8 * (2 * stages + 2 * group)};
  }
};

/// A warpgroup on its way through items.
template <int D>
class QueryRows {
 public:
  using Shape = QueryHalf<D>;

  __device__ QueryRows(const HopperRouteBackward& p, char* memory, uint32_t barriers)
      : p_(p),
        group_(static_cast<int>(threadIdx.x) / warpgroup),
        shared_(shared_address(memory)),
        tables_(memory + Shape::tables_at + 2 * group_ * RowTile::bytes),
        means_(reinterpret_cast<float*>(memory + Shape::means_at) + group_ * block_rows),
        factor_step_(block_rows * p.tiles),
        factors_(p.factors +
                 (int64_t{blockIdx.x} * Shape::groups + group_) * p.route.queries * factor_step_),
        ring_{barriers},
        own_(Shape::own(barriers, group_)),
        rows_(p.route) {}

  template <class Entmax>
  __device__ __forceinline__ void take(const RouteItem& item, const Entmax& entmax,
                                       const Rows<bf16>& dq) {
    place(item);
    warpgroup_sync(1 + group_);  // the last item's tables are done with
    if (two_fit()) copy_sums(item.begin);
    find_thresholds();
    weigh(entmax);
    put_weight_gradients();
    put_numbers();
    add_query_gradients(entmax, dq);
  }

 private:
  __device__ __forceinline__ void place(const RouteItem& item) {
    item_ = item;
    first_ = item.first + group_ * p_.route.queries;
    count_ = max(0, min(p_.route.queries, p_.route.N - first_));
    rows_.place(p_.route, first_, count_);
    own_.wait_full();
    rows_.load(Block{shared_ + group_ * Shape::block_bytes});
    warp_arrive(own_.empty(0));
    own_.next();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_[i] = rows_.routes(i) ? rows_.lane_row(i) / p_.route.g : 0;
      numbers_[i] = {0, 0, rows_.end[i]};
    }
  }

  /// Of the thread's row i, within the group.
  __device__ __forceinline__ int head(int i) const {
    return rows_.lane_row(i) % p_.route.g;
  }
  __device__ __forceinline__ uint32_t stage() const {
    return shared_ + Shape::stages_at + ring_.stage * Shape::stage_bytes;
  }
  __device__ RowTile table(int i) const {
    return RowTile(tables_ + i * RowTile::bytes);
  }
  /// Whether the second table has room for D of two tiles, so that the next tile's may come early.
  __device__ bool two_fit() const {
    return p_.route.queries <= block_rows / 2;
  }
  __device__ RowTile sums(int tile) const {
    return RowTile(table(1).at(two_fit() ? tile % 2 * (block_rows / 2) : 0, 0));
  }
  __device__ __forceinline__ void copy_sums(int tile) const {
    copy_columns(sums(tile), p_.dbias_of(item_, first_), p_.route, tile, count_);
  }
  __device__ __forceinline__ void score(float (&z)[8][4], int tile) {
    ring_.wait_full();
    rows_.multiply(z, stage());
    warp_arrive(ring_.empty(ring_.stage));
    ring_.next();
    rows_.scale(z, tile);
  }

  /// Of the query in the thread's row i.
  __device__ __forceinline__ float tau(int i) const {
    if (!rows_.routes(i)) return 0;
    return static_cast<float>(p_.tau[p_.route.at_row(item_, first_ + row_[i], head(i))]);
  }
  __device__ __forceinline__ void find_thresholds() {
    const float taus[2] = {tau(0), tau(1)};
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
    for (int tile = item_.begin; tile < item_.end; ++tile) {
      float z[8][4];
      score(z, tile);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], z[j][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = Lanes(4).max(top[i]);
      if (rows_.routes(i)) numbers_[i].threshold = top[i] + taus[i];
    }
  }

  /// Leaves x in scratch and, of rows, sums of s, s x and s x D.
  template <class Entmax>
  __device__ __forceinline__ void weigh(const Entmax& entmax) {
    const DashRouting& routing = p_.route.routing;
    const auto sigma_g = static_cast<float>(routing.sigma * p_.route.g);
    const auto eps = static_cast<float>(routing.prior_eps);
    const RowTile p_tile = table(0);
    const int warp = static_cast<int>(threadIdx.x) % warpgroup / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) sum_[i] = sum_x_[i] = sum_xd_[i] = 0;
#pragma unroll 1
    for (int tile = item_.begin; tile < item_.end; ++tile) {
      const RowTile d_tile = sums(tile);
      warpgroup_sync(1 + group_);  // the last tables are done with
      if (!two_fit()) copy_sums(tile);
      float z[8][4], p[8][4];
      score(z, tile);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float threshold = numbers_[e / 2].threshold;
          p[j][e] = entmax.probability(z[j][e], threshold);
          z[j][e] = entmax.weight(z[j][e], threshold);
        }
      }
      p_tile.put(p);
      wait_copies();
      warpgroup_sync(1 + group_);
      if (two_fit() && tile + 1 < item_.end) copy_sums(tile + 1);
      for (int i = warp; i < p_.route.queries; i += 4) {
        const float2 means = p_tile.means(i, p_.route.g);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float w = half == 0 ? means.x : means.y;
          const float x = w > least_weight ? 1 / (sigma_g * (w + eps)) : 0;
          factors_[i * factor_step_ + 64 * tile + 32 * half + lane] = x;
          *p_tile.at(i * p_.route.g, 32 * half + lane) = x;  // nobody else reads what was there
        }
      }
      warpgroup_sync(1 + group_);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x = p_tile.pair(row_[i] * p_.route.g, j), d = d_tile.pair(row_[i], j);
          const float* s = &z[j][2 * i];
          const float sx[2] = {s[0] * x.x, s[1] * x.y};
          sum_[i] += s[0] + s[1];
          sum_x_[i] += sx[0] + sx[1];
          sum_xd_[i] += sx[0] * d.x + sx[1] * d.y;
        }
      }
    }
  }

  /// dw and the means of D; a warp takes a query. Lanes read again what they read before.
  __device__ __forceinline__ void put_weight_gradients() {
    const int warp = static_cast<int>(threadIdx.x) % warpgroup / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int begin = 64 * item_.begin, end = min(64 * item_.end, p_.route.M);
    for (int i = warp; i < count_; i += 4) {
      float* const ds = p_.dbias_of(item_, first_ + i);
      const float* const xs = factors_ + i * factor_step_;
      // Calls f(x, D, where it is) for the lane's chunks, of which it reads eight at a time.
      const auto for_chunks = [&](auto f) {
        constexpr int batch = 8;
        for (int from = begin + lane; from < end; from += 32 * batch) {
          float x[batch], d[batch];
#pragma unroll
          for (int k = 0; k < batch; ++k) {
            const int c = from + 32 * k;
            x[k] = c < end ? xs[c] : 0;
            d[k] = c < end ? ds[c] : 0;
          }
#pragma unroll
          for (int k = 0; k < batch; ++k) {
            if (from + 32 * k < end) f(x[k], d[k], ds + from + 32 * k);
          }
        }
      };
      float mean = 0;
      if (p_.route.routing.center) {
        float sum = 0;
        int support = 0;
        for_chunks([&](float x, float d, float*) {
          sum += x > 0 ? d : 0;
          support += x > 0 ? 1 : 0;
        });
        sum = warp_sum(sum);
        support = warp_sum(support);
        mean = support > 0 ? sum / static_cast<float>(support) : 0;
      }
      for_chunks([&](float x, float d, float* at) { *at = x > 0 ? x * (d - mean) : 0; });
      if (lane == 0) means_[i] = mean;
    }
    warpgroup_sync(1 + group_);
  }

  /// The centres, and what the second half wants to know.
  __device__ __forceinline__ void put_numbers() {
    RowNumbers* to = p_.rows_of(item_, first_ / p_.route.queries);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = Lanes(4).sum(sum_[i]), sum_x = Lanes(4).sum(sum_x_[i]);
      const float sum_xd = Lanes(4).sum(sum_xd_[i]);
      if (sum > 0) numbers_[i].centre = (sum_xd - means_[row_[i]] * sum_x) / sum;
      if (count_ > 0 && threadIdx.x % 4 == 0) to[rows_.lane_row(i)] = numbers_[i];
    }
  }

  template <class Entmax>
  __device__ __forceinline__ void add_query_gradients(const Entmax& entmax, const Rows<bf16>& dq) {
    const auto copy_dw = [&](int tile) {
      copy_columns(table(tile % 2), p_.dbias_of(item_, first_), p_.route, tile, count_);
    };
    copy_dw(item_.begin);
    uint32_t old[2][D / 8];  // of dq, long before it is needed
    read_rows(old, dq);
    float sum[D / 8][4] = {};
    Fragment dz[4];
    pin(sum);
    int before = 0;
#pragma unroll 1
    for (int tile = item_.begin; tile < item_.end; ++tile) {
      const RowTile dw = table(tile % 2);
      float z[8][4];
      score(z, tile);  // the last product is complete, too
      if (tile > item_.begin) warp_arrive(ring_.empty(before));
      wait_copies();
      warpgroup_sync(1 + group_);  // the other table is done with, too
      if (tile + 1 < item_.end) copy_dw(tile + 1);
      score_gradients(z, entmax, numbers_, dw, row_);
      round_to(dz, z);
      ring_.wait_full();
      products_fence();
      add_product(sum, dz, Block{stage()});
      products_commit();
      before = ring_.stage;
      ring_.next();
    }
    products_wait<0>();
    pin(sum);
    warp_arrive(ring_.empty(before));
    add_rows(sum, old, dq);
  }

  /// Where the thread has parts of its row i of dq, a pair of every eight columns.
  __device__ __forceinline__ uint32_t* row_of(const Rows<bf16>& dq, int i) const {
    bf16* row = dq.at(item_.b, item_.r * p_.route.g + head(i), first_ + row_[i]);
    return reinterpret_cast<uint32_t*>(row) + threadIdx.x % 4;
  }
  __device__ __forceinline__ void read_rows(uint32_t (&old)[2][D / 8], const Rows<bf16>& dq) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* from = row_of(dq, i);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) old[i][j] = rows_.routes(i) ? from[4 * j] : 0;
    }
  }
  __device__ __forceinline__ void add_rows(const float (&sum)[D / 8][4],
                                           const uint32_t (&old)[2][D / 8],
                                           const Rows<bf16>& dq) const {
    const auto scale = static_cast<float>(p_.route.alpha_gamma[1] / sqrt(static_cast<double>(D)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows_.routes(i)) continue;
      uint32_t* to = row_of(dq, i);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        to[4 * j] = pack(__uint_as_float(old[i][j] << 16) + scale * sum[j][2 * i],
                         __uint_as_float(old[i][j] & 0xffff0000u) + scale * sum[j][2 * i + 1]);
      }
    }
  }

  const HopperRouteBackward& p_;
  const int group_;
  const uint32_t shared_;
  char* const tables_;  // two
  float* const means_;  // of D, by query
  const int factor_step_;
  float* const factors_;  // x [queries, factor_step_]
  Ring<Shape::stages> ring_;
  Ring<1> own_;
  RouteRows<D> rows_;
  RouteItem item_;
  int first_, count_;  // queries
  int row_[2];         // queries of the thread's rows, from first_ on; 0 where they do not route
  RowNumbers numbers_[2];  // of these rows
  float sum_[2], sum_x_[2], sum_xd_[2];
};

/// The thread that copies.
template <int D>
__device__ void copy_ahead(const CUtensorMap& q, const CUtensorMap& high, const CUtensorMap& low,
                           const CUtensorMap& rounded, const HopperRoute& p, uint32_t shared,
                           uint32_t barriers) {
  using Shape = QueryHalf<D>;
  Ring<Shape::stages> ring{barriers};
  uint32_t parity = 0;
  for_items(p.items(Shape::groups), [&](int index) {
    const RouteItem item = p.item(index, Shape::groups);
    if (item.begin == item.end) return;
    for (int i = 0; i < Shape::groups; ++i) {
      Ring<1> own = Shape::own(barriers, i);
      own.parity = parity;
      own.wait_empty();
      copy_rows<D>(Block{shared + i * Shape::block_bytes}, q, own.full(), p, item,
                   item.first + i * p.queries);
    }
    parity ^= 1;
    const auto stage = [&] { return shared + Shape::stages_at + ring.stage * Shape::stage_bytes; };
    for (int sweep = 1; sweep <= 3; ++sweep) {
      for (int tile = item.begin; tile < item.end; ++tile) {
        ring.wait_empty();
        copy_tile<D>(stage(), high, low, ring.full(), item, tile);
        ring.next();
        if (sweep < 3) continue;
        ring.wait_empty();
        barrier_arrive_expecting(ring.full(), Shape::block_bytes);
        copy_block<D>(Block{stage()}, rounded, ring.full(), 64 * tile, item.r, item.b);
        ring.next();
      }
    }
  });
}

template <int D>
__global__ void __launch_bounds__(QueryHalf<D>::threads, 1)
    query_gradients(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap high,
                    const __grid_constant__ CUtensorMap low,
                    const __grid_constant__ CUtensorMap rounded,
                    const __grid_constant__ HopperRouteBackward p, const Rows<bf16> dq) {
#ifdef ENTRAIN_HOPPER
  using Shape = QueryHalf<D>;
  constexpr int groups = Shape::groups;
  const uint32_t at = shared_address(dynamic_shared()), shared = (at + 1023) / 1024 * 1024;
  const uint32_t barriers = shared + Shape::barriers_at;
  if (threadIdx.x == 0) {
    Ring<Shape::stages>::init(barriers, 4 * groups);
    for (int i = 0; i < groups; ++i) Ring<1>::init(Shape::own(barriers, i).barriers, 4);
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x / warpgroup == groups) {
    fewer_registers<groups == 3 ? 32 : 24>();
    if (threadIdx.x % warpgroup != 0) return;
    copy_ahead<D>(q, high, low, rounded, p.route, shared, barriers);
    return;
  }
  more_registers<groups == 3 ? 160 : 240>();
  by_curve(p.route.alpha_gamma[0], [&](const auto& entmax) {
    QueryRows<D> rows(p, dynamic_shared() + (shared - at), barriers);
    for_items(p.route.items(groups), [&](int index) {
      const RouteItem item = p.route.item(index, groups);
      if (item.begin < item.end) rows.take(item, entmax, dq);
    });
  });
#endif
}

/// Sizes, and how sums over rows are cut: into about three times as many as an H100 has
/// multiprocessors, on any GPU, so that sums do not depend on it.
HopperRouteBackward backward_sizes(const Shape& q, const Shape& kbar) {
  const int64_t heads = kbar[0] * kbar[1], queries = block_rows / (q[1] / kbar[1]);
  const int64_t tiles = ceil_div(kbar[2], 64), row_tiles = ceil_div(q[2], queries);
  // Half of all pairs of a row tile and 128 chunks have candidates, and those on the diagonal.
  const int64_t wanted = ceil_div(6 * 132, heads * (ceil_div(tiles, 2) + 1));
  const int64_t segment = ceil_div(row_tiles, wanted);
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  return {whole(heads), whole(tiles), whole(row_tiles), whole(segment),
          whole(ceil_div(row_tiles, segment))};
}

/// Where the parts of scratch begin, in bytes, the summaries at 0.
struct BackwardScratch {
  int64_t rows, factors, sums, bytes;

  BackwardScratch(const HopperRouteBackward& p, const Shape& q, const Shape& kbar) {
    const int64_t tile_floats = 64 * int64_t{p.tiles};
    rows = Summaries::scratch(kbar) * int64_t{sizeof(double)};
    factors = rows + int64_t{p.heads} * p.row_tiles * block_rows * int64_t{sizeof(RowNumbers)};
    const int64_t most_groups = 3 * int64_t{multiprocessors()};
    sums = factors + 4 * most_groups * (block_rows / (q[1] / kbar[1])) * tile_floats;
    bytes = sums + 4 * int64_t{p.heads} * p.segments * tile_floats * q[3];
  }
};

}  // namespace

int64_t hopper_route_backward_scratch(const Shape& q, const Shape& kbar) {
  const int64_t D = q[3], g = kbar[1] > 0 ? q[1] / kbar[1] : 0;
  const bool fits = (D == 64 || D == 128) && g >= 1 && g <= block_rows && kbar.numel() > 0;
  if (!fits || !on_hopper()) return 0;
  return BackwardScratch(backward_sizes(q, kbar), q, kbar).bytes / int64_t{sizeof(double)};
}

bool route_backward_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                           const Tensor& tau, const Tensor& dbias, const Tensor& dq_sum,
                           const Tensor& dkbar, const Tensor& scratch) {
  if (!hopper_route_takes(q, kbar, routing)) return false;
  const Summaries summaries = prepare_summaries(kbar, scratch);
  HopperRouteBackward p = backward_sizes(q.shape, kbar.shape);
  const BackwardScratch at(p, q.shape, kbar.shape);
  char* memory = reinterpret_cast<char*>(pointer<double>(scratch));
  p.route = hopper_route_problem(q, kbar, routing, 0);
  p.tau = pointer<double>(tau);
  p.dbias = pointer<float>(dbias);
  p.rows = reinterpret_cast<RowNumbers*>(memory + at.rows);
  p.factors = reinterpret_cast<float*>(memory + at.factors);
  p.sums = reinterpret_cast<float*>(memory + at.sums);
  const CUtensorMap queries = packed_map(Rows<bf16>(q), p.route.B, p.route.Hq, p.route.N, p.route.D,
                                         p.route.g, block_rows / p.route.g);
  by_dense_head_dim(p.route.D, [&](auto D) {
    using Shape = QueryHalf<D>;
    launch("route_backward: dq", query_gradients<D>,
           std::min(p.route.items(Shape::groups), multiprocessors()), Shape::threads,
           Shape::shared_bytes, queries, Summaries::map(summaries.high),
           Summaries::map(summaries.low), Summaries::map(summaries.rounded), p, Rows<bf16>(dq_sum));
  });
  hopper_route_dkbar(p, queries, summaries, pointer<double>(dkbar));
  return true;
}

}  // namespace entrain::cuda
