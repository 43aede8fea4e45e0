#pragma once
// A tile of DashAttention's router for bf16 queries: what route_tile.cuh is in double, in float.
// bf16 queries have 8 digits of their own, so float, with its 24, may decide.
//
//   q [rows, D] bf16, shared --ldmatrix--.
//   kbar [M, D] f64, in L2 -> float -> three bf16 parts, registers --mma--> z [rows, M] f32, shared
//
// A row is a (query, head). The parts of kbar add up to its float exactly and products of bf16 are
// exact in float, so scores err by rounding of float sums alone. Every score is summed in the same
// order wherever its row lies in a tile: the backward pass finds the support of the forward pass.
#include "kernels/cuda/entmax_float.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/route_tile.cuh"

namespace entrain::cuda {

constexpr int bf16_threads = 384, bf16_warps = bf16_threads / 32;
constexpr int64_t bf16_width = 512;  // candidates: 32 groups of 16 have a bit each in a word
// Lesser routing weights count as none: their gradients, D / (sigma w), could overflow a float.
constexpr float least_weight = 1e-35f;

/// Two floats as sums of three bf16 each.
__device__ __forceinline__ void split_in_three(float x, float y, uint32_t& high, uint32_t& middle,
                                               uint32_t& low) {
  auto take = [&] {
    const uint32_t both = pack(x, y);
    x -= __uint_as_float(both << 16);
    y -= __uint_as_float(both & 0xffff0000u);
    return both;
  };
  high = take();
  middle = take();
  low = take();
}

/// How queries are cut into tiles, and where the parts of a tile begin in shared memory, in bytes;
/// q at 0.
struct Bf16RouteShape {
  int64_t B, Hq, Hkv, N, M;
  int g, D, width;     // width: candidates of the last query, the most there are
  int queries, rows;   // of a tile; rows are a multiple of 16
  int q_step, z_step;  // from row to row, in elements: rows lie in different banks
  int z, w, tau, n, own, live;
  int64_t bytes;

  void cut(int queries_of_tile, bool weights) {
    queries = queries_of_tile;
    rows = (queries * g + 15) / 16 * 16;
    q_step = (D + 15) / 16 * 16 + 8;
    z_step = (width + 31) / 32 * 32 + 8;
    z = 2 * rows * q_step;
    w = z + 4 * rows * z_step;
    tau = w + (weights ? 4 * queries * z_step : 0);
    n = tau + 4 * rows;
    own = n + 4 * rows;
    live = own + 4 * queries;
    bytes = live + 4;
  }
  __host__ __device__ int64_t tiles() const { return (N + queries - 1) / queries; }
};

struct Bf16RouteProblem {
  Bf16RouteShape shape;
  DashRouting routing;
  const double* alpha_gamma;  // on the GPU
  int64_t first;              // the token that the first query is
  bool packed;                // rows of q consist of 16 bytes
  Rows<bf16> q;
  SummaryRows kbar;
};

/// What routing writes, see Kernels::dash_route.
struct RouteOutput {
  double* tau;
  uint32_t* mask;
  int64_t half_words;  // of a row of the mask
  float *bias, *weights;
  double* read;

  RouteOutput(const Tensor& tau, const BlockSet& blocks, const Tensor& weights, const Tensor& read)
      : tau(pointer<double>(tau)),
        mask(reinterpret_cast<uint32_t*>(pointer<uint64_t>(blocks.mask))),
        half_words(2 * blocks.mask[3]),
        bias(pointer<float>(blocks.bias)),
        weights(pointer<float>(weights)),
        read(pointer<double>(read)) {}
};

/// One tile of queries of one kv head. Columns are candidates, from chunk init_blocks on.
struct Bf16RouteTile {
  const Bf16RouteProblem& p;
  const double alpha;
  const float scale;         // of q . kbar: z
  bf16* const q;             // [rows, q_step]
  float* const z;            // [rows, z_step] scores as entmax_float.cuh takes them
  float* const w;            // [queries, z_step]
  float* const tau;          // [rows]
  int* const n;              // [rows] candidates, 0 for rows that only fill the tile
  int* const own;            // [queries] the chunk a query is in
  unsigned* const live;      // bit j: columns 16 j to 16 j + 15 hold gradients
  int64_t b, r, first;       // batch, kv head, first query
  int count = 0, width = 0;  // queries; candidates of the last of them

  __device__ Bf16RouteTile(const Bf16RouteProblem& p, char* shared)
      : p(p),
        alpha(p.alpha_gamma[0]),
        scale(static_cast<float>(p.alpha_gamma[1] / sqrt(static_cast<double>(p.shape.D)))),
        q(reinterpret_cast<bf16*>(shared)),
        z(reinterpret_cast<float*>(shared + p.shape.z)),
        w(reinterpret_cast<float*>(shared + p.shape.w)),
        tau(reinterpret_cast<float*>(shared + p.shape.tau)),
        n(reinterpret_cast<int*>(shared + p.shape.n)),
        own(reinterpret_cast<int*>(shared + p.shape.own)),
        live(reinterpret_cast<unsigned*>(shared + p.shape.live)) {}

  /// Scores of the tile's queries, up to 16 row_tiles rows. All parts of the tile may be read on
  /// return.
  template <int row_tiles>
  __device__ void load(int64_t batch, int64_t head, int64_t tile) {
    const Bf16RouteShape& s = p.shape;
    b = batch;
    r = head;
    first = tile * s.queries;
    count = static_cast<int>(s.N - first < s.queries ? s.N - first : s.queries);
    width = candidates_of(chunk_of(count - 1));
    for (int row = threadIdx.x; row < s.rows; row += bf16_threads) {
      const int i = row / s.g, chunk = chunk_of(i);
      n[row] = i < count ? candidates_of(chunk) : 0;
      if (i < count && row % s.g == 0) own[i] = chunk;
    }
    if (threadIdx.x == 0) *live = 0;
    p.packed ? load_queries<8>() : load_queries<1>();
    __syncthreads();
    p.kbar.at(b, r, p.routing.init_blocks, [&](const auto* kbar) { score<row_tiles>(kbar); });
    __syncthreads();
  }

  __device__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ float* scores(int row) const { return z + row * p.shape.z_step; }
  __device__ const double* kbar() const { return p.kbar.at(b, r, p.routing.init_blocks); }
  /// Where query i is in [B, Hkv, N], and of head h in [B, Hq, N].
  __device__ int64_t at_query(int i) const { return (b * p.shape.Hkv + r) * p.shape.N + first + i; }
  __device__ int64_t at_row(int i, int h) const {
    return (b * p.shape.Hq + r * p.shape.g + h) * p.shape.N + first + i;
  }

  /// Calls f(row) for all rows, eight lanes each, whole warps together.
  template <class F>
  __device__ void for_rows(F f) const {
    constexpr int rows_of_warp = 32 / row_lanes;
    for (int row = warp() * rows_of_warp; row < p.shape.rows; row += bf16_warps * rows_of_warp) {
      f(row + lane() / row_lanes);
    }
  }
  /// Calls f(head, query, row) for all there are, each in one thread, along the queries of a head.
  template <class F>
  __device__ void for_thresholds(F f) const {
    for (int x = threadIdx.x; x < count * p.shape.g; x += bf16_threads) {
      const int h = x / count, i = x % count;
      f(h, i, i * p.shape.g + h);
    }
  }

  /// The routing weight of query i on a column below n.
  template <class Entmax>
  __device__ float weight(const Entmax& entmax, int i, int column) const {
    const int g = p.shape.g;
    float sum = 0;
    for (int row = i * g; row < (i + 1) * g; ++row) {
      sum += entmax.probability(scores(row)[column], tau[row]);
    }
    return sum / static_cast<float>(g);
  }

 private:
  __device__ int chunk_of(int i) const {
    return static_cast<int>((p.first + first + i) / p.routing.chunk);
  }
  __device__ int candidates_of(int chunk) const {
    return static_cast<int>(candidates(p.routing, chunk));
  }

  /// Zeros fill rows and columns up to a multiple of 16.
  template <int wide>
  __device__ void load_queries() {
    const Bf16RouteShape& s = p.shape;
    const int packs = (s.q_step - 8) / wide;
    for (int x = threadIdx.x; x < s.rows * packs; x += bf16_threads) {
      const int row = x / packs, d = x % packs * wide, i = row / s.g;
      Pack<bf16, wide> pack = {};
      if (i < count && d < s.D) {
        pack = *reinterpret_cast<const Pack<bf16, wide>*>(
            p.q.at(b, r * s.g + row % s.g, first + i) + d);
      }
      *reinterpret_cast<Pack<bf16, wide>*>(q + row * s.q_step + d) = pack;
    }
  }

  /// z = (alpha - 1) scale q . kbar: a warp takes eight columns of all rows, so that a block splits
  /// each summary once. The next 16 dimensions of summaries are on their way meanwhile.
  template <int row_tiles, class K>
  __device__ void score(const K* kbar) {
    const Bf16RouteShape& s = p.shape;
    const int x = lane() / 4, t = lane() % 4, tiles = s.rows / 16;
    const float factor = alpha == 1 ? scale : scale * static_cast<float>(alpha - 1);
    const uint32_t a_at = shared_address(q + lane() % 16 * s.q_step + lane() / 16 * 8);
    for (int c0 = 8 * warp(); c0 < width; c0 += 8 * bf16_warps) {
      const K* key = kbar + (c0 + x) * p.kbar.token_step + 2 * t;
      auto load_keys = [&](double(&to)[2][2], int d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          to[i][0] = to[i][1] = 0;
          const int at = d + 8 * i;
          if (c0 + x < width && at + 2 * t < s.D) load_pair(to[i], key + at);
        }
      };
      float sum[row_tiles][4] = {};
      double next[2][2];
      load_keys(next, 0);
#pragma unroll 1
      for (int d = 0; d < s.D; d += 16) {
        uint32_t parts[3][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          split_in_three(static_cast<float>(next[i][0]), static_cast<float>(next[i][1]),
                         parts[2][i], parts[1][i], parts[0][i]);
        }
        load_keys(next, d + 16);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          if (m >= tiles) break;
          Fragment a;
          load_matrices(a, a_at + 2 * (16 * m * s.q_step + d));
#pragma unroll
          for (int part = 0; part < 3; ++part) mma(sum[m], a, parts[part][0], parts[part][1]);
        }
      }
      const int c = c0 + 2 * t;
#pragma unroll
      for (int i = 0; i < 2 * row_tiles; ++i) {
        if (i / 2 >= tiles) break;
        const int row = 8 * i + x, m = n[row];
        const float* pair = sum[i / 2] + i % 2 * 2;
        *reinterpret_cast<float2*>(scores(row) + c) = make_float2(
            c < m ? factor * pair[0] : -INFINITY, c + 1 < m ? factor * pair[1] : -INFINITY);
      }
    }
  }
};

/// Tiles of up to 16 row_tiles rows: as many as leave room for two blocks in a multiprocessor, or
/// for one; bytes 0 where this way of routing does not do. weights: whether a tile keeps w.
inline Bf16RouteShape bf16_route_shape(const Tensor& q, const Tensor& kbar,
                                       const DashRouting& routing, int64_t first, int row_tiles,
                                       bool weights) {
  const RouteShape of = route_shape_of(q, kbar, routing, first);
  Bf16RouteShape s = {};
  s.B = of.B, s.Hq = of.Hq, s.Hkv = of.Hkv, s.N = of.N, s.M = of.M;
  s.g = of.g, s.D = of.D, s.width = of.width;
  if (q.dtype != DType::bf16 || routing.aggregation != Aggregation::entmax ||
      s.width > bf16_width) {
    return s;
  }
  const auto [most, half] = SharedMemory::of_device();
  for (int rows = 16 * row_tiles; rows >= s.g; rows -= 16) {
    s.cut(static_cast<int>(std::min<int64_t>(s.N, rows / s.g)), weights);
    if (s.bytes <= half) return s;
  }
  if (s.bytes > most) s.bytes = 0;
  return s;
}

inline Bf16RouteProblem bf16_route_problem(const Bf16RouteShape& s, const Tensor& q,
                                           const Tensor& kbar, const DashRouting& routing,
                                           int64_t first) {
  bool packed = false;
  by_pack<bf16>({q}, [&](auto wide) { packed = wide > 1; });
  return {s,
          routing,
          on_device(routing.alpha_gamma, 2),
          first,
          packed,
          Rows<bf16>(q),
          SummaryRows(kbar)};
}

}  // namespace entrain::cuda
