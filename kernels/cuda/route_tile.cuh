#pragma once
// A tile of DashAttention's router (arXiv 2605.18753, stage 1): the queries of one kv head that a
// block of threads routes together, up to 64 (query, head) rows, and their scores against chunk
// summaries. All of it stays in shared memory, in double as on the CPU (see kernels/cpu/dash.cpp);
// scores are 1 / chunk of full attention's and run on the tensor cores (see score_tile.cuh).
#include "kernels/cuda/entmax_row.cuh"
#include "kernels/cuda/score_tile.cuh"

namespace entrain::cuda {

/// How queries are cut into tiles, and where the parts of a tile lie in shared memory.
struct RouteShape {
  int64_t B, Hq, Hkv, N, M;
  int g, D, width;          // width: candidates of the last query, the most there are
  int queries, rows;        // of a tile
  int lanes;                // that share a row
  int q_step, z_step;       // from row to row
  int z, w, tau, extra;     // where they begin, in doubles; q at 0
  int n, active, n_active;  // likewise, in ints
  int64_t bytes;

  void cut(int queries_of_tile) {
    queries = queries_of_tile;
    rows = queries * g;
    q_step = row_step(D);
    z_step = row_step(width);
    z = (rows + 15) / 16 * 16 * q_step;
    w = z + rows * z_step;
    tau = w + queries * z_step;
    extra = tau + rows;
    n = 2 * (extra + rows);
    active = n + queries;
    n_active = active + z_step / 4;
    bytes = 4 * int64_t{n_active + 1};
  }
  __host__ __device__ int64_t tiles() const { return (N + queries - 1) / queries; }
};

/// Summaries [B, Hkv, M, D]: f64, or f32 as caches of bf16 models have them.
struct SummaryRows {
  const void* data;
  bool narrow;  // f32
  int64_t batch_step, head_step, token_step;

  __host__ explicit SummaryRows(const Tensor& kbar) : SummaryRows(kbar, kbar.dtype == DType::f32) {}

  /// Calls f with where a row is.
  template <class F>
  __device__ void at(int64_t b, int64_t h, int64_t c, F f) const {
    const int64_t offset = b * batch_step + h * head_step + c * token_step;
    narrow ? f(static_cast<const float*>(data) + offset)
           : f(static_cast<const double*>(data) + offset);
  }
  /// Where it is known that they are f64.
  __device__ const double* at(int64_t b, int64_t h, int64_t c) const {
    return static_cast<const double*>(data) + b * batch_step + h * head_step + c * token_step;
  }

 private:
  __host__ SummaryRows(const Tensor& kbar, bool narrow)
      : data(narrow ? static_cast<const void*>(pointer<float>(kbar)) : pointer<double>(kbar)),
        narrow(narrow),
        batch_step(kbar.stride[0]),
        head_step(kbar.stride[1]),
        token_step(kbar.stride[2]) {}
};

template <class T>
struct RouteProblem {
  RouteShape shape;
  DashRouting routing;
  const double* alpha_gamma;  // on the GPU
  int64_t first;              // the token that the first query is
  Rows<T> q;
  SummaryRows kbar;
};

/// The chunks that a query in chunk `own` routes over: so many after the first init_blocks, all
/// complete, none forced.
__host__ __device__ inline int64_t candidates(const DashRouting& routing, int64_t own) {
  const int64_t end = own - (routing.local_blocks > 1 ? routing.local_blocks - 1 : 0);
  return end > routing.init_blocks ? end - routing.init_blocks : 0;
}

/// One tile of queries of one kv head. Columns are candidates, from chunk init_blocks on.
template <class T>
struct RouteTile {
  const RouteProblem<T>& p;
  const bool softmax_first;
  const Entmax entmax;
  const double gamma, scale;  // scale: of the queries
  const Lanes lanes;
  double* const q;         // [rows up to a multiple of 16, q_step]
  double* const z;         // [rows, z_step] scores, then their softmax or their gradients
  double* const w;         // [queries, z_step] routing weights, or on the way to them and back
  double* const tau;       // [rows]
  double* const extra;     // [rows]
  int* const n;            // [queries] candidates
  int* const active;       // [z_step / 8] whether 8 columns hold gradients
  int* const active_list;  // [z_step / 8] those that do
  int* const n_active;
  int64_t b, r, first;       // batch, kv head, first query
  int count = 0, width = 0;  // queries; candidates of the last of them

  __device__ RouteTile(const RouteProblem<T>& p, double* shared)
      : p(p),
        softmax_first(p.routing.aggregation == Aggregation::softmax),
        entmax(p.alpha_gamma[0]),
        gamma(p.alpha_gamma[1]),
        scale((softmax_first ? 1 : gamma) / sqrt(static_cast<double>(p.shape.D))),
        lanes(p.shape.lanes),
        q(shared),
        z(shared + p.shape.z),
        w(shared + p.shape.w),
        tau(shared + p.shape.tau),
        extra(shared + p.shape.extra),
        n(reinterpret_cast<int*>(shared) + p.shape.n),
        active(reinterpret_cast<int*>(shared) + p.shape.active),
        active_list(active + p.shape.z_step / 8),
        n_active(reinterpret_cast<int*>(shared) + p.shape.n_active) {}

  /// Scores of the tile's queries. All parts of the tile may be read on return.
  __device__ void load(int64_t batch, int64_t head, int64_t tile) {
    const RouteShape& s = p.shape;
    b = batch;
    r = head;
    first = tile * s.queries;
    count = static_cast<int>(s.N - first < s.queries ? s.N - first : s.queries);
    width = candidates_of(count - 1);
    for (int i = threadIdx.x; i < count; i += tile_threads) n[i] = candidates_of(i);
    load_queries(p.q.at(b, r * s.g, first), p.q.head_step, p.q.token_step, count, s.g, s.D, scale,
                 q);
    __syncthreads();
    p.kbar.at(b, r, p.routing.init_blocks, [&](const auto* kbar) {
      score(q, rows(), s.D, kbar, p.kbar.token_step, width, z, s.z_step);
    });
    __syncthreads();
  }

  __device__ int rows() const { return count * p.shape.g; }
  __device__ int64_t own(int i) const { return (p.first + first + i) / p.routing.chunk; }
  __device__ const double* kbar() const { return p.kbar.at(b, r, p.routing.init_blocks); }
  /// Where query i is in [B, Hkv, N], and row (query, head) in [B, Hq, N].
  __device__ int64_t at_query(int i) const { return (b * p.shape.Hkv + r) * p.shape.N + first + i; }
  __device__ int64_t at_row(int row) const {
    const RouteShape& s = p.shape;
    return (b * s.Hq + r * s.g + row % s.g) * s.N + first + row / s.g;
  }

  /// Calls f(row, whether there is such a row) for rows [0, number), lanes.width lanes each, whole
  /// warps together.
  template <class F>
  __device__ void for_rows(int number, F f) const {
    const int groups = tile_threads / lanes.width, group = threadIdx.x / lanes.width;
    for (int row = group; row - group < number; row += groups) {
      f(row < number ? row : 0, row < number);
    }
  }
  /// Calls f(query, column) for all, each in one thread.
  template <class F>
  __device__ void for_columns(F f) const {
    for (int x = threadIdx.x; x < count * width; x += tile_threads) f(x / width, x % width);
  }

  /// Where entmax is taken of: z, or w: gamma times the mean of the heads' softmax, which takes the
  /// place of z.
  __device__ void prepare() {
    const int g = p.shape.g, step = p.shape.z_step;
    if (!softmax_first) return;
    for_rows(rows(),
             [&](int row, bool is) { softmax_row(z + row * step, is ? n[row / g] : 0, lanes); });
    __syncthreads();
    const double share = gamma / g;
    for_columns([&](int i, int c) {
      double sum = 0;
      for (int h = 0; h < g; ++h) sum += share * z[(i * g + h) * step + c];
      w[i * step + c] = sum;
    });
    __syncthreads();
  }

  /// The thresholds of each head, or of all heads mixed; 0 where there are no candidates.
  __device__ void find_thresholds() {
    const int g = p.shape.g, step = p.shape.z_step, heads = softmax_first ? g : 1;
    const double* from = softmax_first ? w : z;
    for_rows(rows() / heads, [&](int row, bool is) {
      const int m = is ? n[row * heads / g] : 0;
      const double t = entmax.threshold(from + row * step, m, lanes);
      for (int h = lanes.rank; is && h < heads; h += lanes.width) {
        tau[row * heads + h] = m > 0 ? t : 0;
      }
    });
    __syncthreads();
  }
  __device__ void load_thresholds(const double* from) {
    for (int row = threadIdx.x; row < rows(); row += tile_threads) tau[row] = from[at_row(row)];
    __syncthreads();
  }

  /// w [count, width]: the routing weights, 0 where a query has no such candidate.
  __device__ void weigh() {
    const int g = p.shape.g, step = p.shape.z_step;
    for_columns([&](int i, int c) {
      double sum = 0;
      if (c < n[i]) {
        if (softmax_first) {
          sum = entmax.probability(w[i * step + c], tau[i * g]);
        } else {
          for (int h = 0; h < g; ++h) {
            sum += entmax.probability(z[(i * g + h) * step + c], tau[i * g + h]);
          }
          sum /= g;
        }
      }
      w[i * step + c] = sum;
    });
    __syncthreads();
  }

 private:
  __device__ int candidates_of(int i) const {
    return static_cast<int>(candidates(p.routing, own(i)));
  }
};

/// What is to be routed, not yet cut into tiles.
inline RouteShape route_shape_of(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                                 int64_t first) {
  const bool fit = q.shape.rank == 4 && kbar.shape.rank == 4 && q[0] == kbar[0] &&
                   q[3] == kbar[3] && kbar[1] > 0 && q[1] % kbar[1] == 0 &&
                   kbar[2] * routing.chunk >= first + q[2];
  if (!fit) {
    fail("routing of queries " + q.shape.to_string() + " from token " + std::to_string(first) +
         " on over summaries " + kbar.shape.to_string() + " of chunks of " +
         std::to_string(routing.chunk));
  }
  check_pairs("kbar", kbar);
  RouteShape s = {};
  s.B = q[0], s.Hq = q[1], s.Hkv = kbar[1], s.N = q[2], s.M = kbar[2];
  s.g = static_cast<int>(s.Hq / s.Hkv);
  s.D = static_cast<int>(q[3]);
  s.width = static_cast<int>(candidates(routing, (first + s.N - 1) / routing.chunk));
  return s;
}

/// Tiles of up to 64 rows: as many as leave room for two blocks in a multiprocessor, where that is
/// 16 or more, else as many as fit.
inline RouteShape route_shape(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                              int64_t first) {
  RouteShape s = route_shape_of(q, kbar, routing, first);
  s.cut(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(s.N, 64 / s.g))));
  const auto [most, half] = SharedMemory::of_device();
  while (s.queries > 1 && s.bytes > half && s.rows >= 32) s.cut(s.queries / 2);
  while (s.queries > 1 && s.bytes > most) s.cut(s.queries / 2);
  if (s.bytes > most) {
    fail("routing over " + std::to_string(s.width) + " chunks with " + std::to_string(s.g) +
         " query heads to a kv head needs " + std::to_string(s.bytes) + " bytes of shared " +
         "memory, more than the " + std::to_string(most) + " of this GPU; take larger chunks");
  }
  s.lanes = 32;
  while (s.lanes > 4 && s.lanes * s.rows > tile_threads) s.lanes /= 2;
  return s;
}

template <class T>
RouteProblem<T> route_problem(const RouteShape& s, const Tensor& q, const Tensor& kbar,
                              const DashRouting& routing, int64_t first) {
  return {s, routing, on_device(routing.alpha_gamma, 2), first, Rows<T>(q), SummaryRows(kbar)};
}

}  // namespace entrain::cuda
