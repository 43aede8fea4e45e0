#pragma once
// DashAttention's router for bf16 queries on Hopper: what its forward pass (route_hopper.cu) and
// its backward pass share. It is route_bf16.cuh's mathematics where the scores are never kept, so
// that there may be any number of chunks: each sweep over them computes scores anew, to the same
// bits.
//
//   q [64 rows, D] bf16, shared --ldmatrix--> f16, registers, for as long as the rows are routed
//   32 kbar = high + low, f16 [64 chunks, D] each, shared --wgmma--> z [64 rows, 64 chunks] f32,
//   registers
//
// A row is a (query, head), a warpgroup has 64 / g queries of one kv head with their g heads side
// by side; the last 64 % g rows are nobody's. A tile is chunks [64 t, 64 t + 64), a word of the
// mask. high and low hold 22 bits of kbar, products of f16 are exact in float: scores err by
// rounding of float sums, low products first. q is exact in f16 between 2^-17 and 65504.
//
// tau holds the threshold, a float, exactly: probability(z, tau) has the same bits in both passes.
#include <cuda_fp16.h>

#include <cmath>

#include "kernels/cuda/attention_hopper.cuh"
#include "kernels/cuda/route_bf16.cuh"

namespace entrain::cuda {

/// Of high and low: keeps most of low above 2^-14, where f16 has fewer bits; |kbar| may be 2047.
constexpr float summary_scale = 32;

/// What products take of kbar, each [B, Hkv, M, D] of 16-bit elements, one after the other.
struct Summaries {
  Tensor high, low;  // f16, by summary_scale
  Tensor rounded;    // bf16

  /// In elements of f64.
  static int64_t scratch(const Shape& kbar) { return kbar.numel(); }
  static CUtensorMap map(const Tensor& part) {
    return block_map(Rows<bf16>(part), part[0], part[1], part[2], part[3]);
  }
};

/// Of a tile, a bit for each chunk before c.
__device__ __forceinline__ uint64_t chunks_before(int c, int tile) {
  const int bits = c - 64 * tile;
  return bits <= 0 ? 0 : bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

/// Queries that a thread block routes together, and the tiles with candidates of any of them.
struct RouteItem {
  int b, r, first;  // batch, kv head, first query
  int begin, end;   // tiles
};

/// A problem as the kernels take it.
struct HopperRoute {
  int B, Hq, Hkv, g, N, M, D;
  int queries;  // of a warpgroup
  int first;    // the token that the first query is
  DashRouting routing;
  const double* alpha_gamma;  // on the GPU

  /// Work for thread blocks of so many warpgroups.
  __host__ __device__ int items(int groups) const {
    return B * Hkv * ((N + groups * queries - 1) / (groups * queries));
  }

  __device__ int init() const { return static_cast<int>(routing.init_blocks); }
  /// The chunk a query is in.
  __device__ int own(int query) const { return (first + query) / static_cast<int>(routing.chunk); }
  /// Candidates of queries in a chunk are the chunks from init() up to here.
  __device__ int end_of(int own) const {
    return init() + static_cast<int>(candidates(routing, own));
  }
  __device__ int end(int query) const { return end_of(own(query)); }
  /// Tiles in which queries before `last` + 1 have candidates: [first_tile(), end_tile(last)).
  __device__ int first_tile() const { return init() / 64; }
  __device__ int end_tile(int last) const {
    const int to = end(last);
    return to > init() ? (to + 63) / 64 : first_tile();
  }
  /// Those with most candidates come first.
  __device__ RouteItem item(int index, int groups) const {
    const int heads = B * Hkv, size = groups * queries, head = index % heads;
    const int at = ((N + size - 1) / size - 1 - index / heads) * size;
    return {head / Hkv, head % Hkv, at, first_tile(), end_tile(min(at + size, N) - 1)};
  }
  /// Where a query is in [B, Hkv, N], and of head h of its group in [B, Hq, N].
  __device__ int64_t at_query(const RouteItem& item, int query) const {
    return (int64_t{item.b} * Hkv + item.r) * N + query;
  }
  __device__ int64_t at_row(const RouteItem& item, int query, int h) const {
    return (int64_t{item.b} * Hq + item.r * g + h) * N + query;
  }
};

/// Whether this router takes a problem; how its kernels do; its summaries, in scratch.
bool hopper_route_takes(const Tensor& q, const Tensor& kbar, const DashRouting& routing);
HopperRoute hopper_route_problem(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                                 int64_t first);
Summaries prepare_summaries(const Tensor& kbar, const Tensor& scratch);

/// Starts copies of a warpgroup's rows, from a query on, and of both parts of a tile of summaries.
template <int D>
__device__ void copy_rows(Block to, const CUtensorMap& q, uint32_t barrier, const HopperRoute& p,
                          const RouteItem& item, int query) {
  barrier_arrive_expecting(barrier, D / 64 * p.queries * p.g * 128);
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    copy_panel(to.address + panel * panel_bytes, q, barrier, panel * 64, item.r * p.g, query,
               item.b);
  }
}
template <int D>
__device__ void copy_tile(uint32_t stage, const CUtensorMap& high, const CUtensorMap& low,
                          uint32_t barrier, const RouteItem& item, int tile) {
  constexpr int part_bytes = D / 64 * panel_bytes;
  barrier_arrive_expecting(barrier, 2 * part_bytes);
  copy_block<D>(Block{stage}, high, barrier, 64 * tile, item.r, item.b);
  copy_block<D>(Block{stage + part_bytes}, low, barrier, 64 * tile, item.r, item.b);
}

/// The rows of a warpgroup. Lane l of warp w has parts of rows 16 w + l / 4 and 8 after it: of z,
/// as accumulators lie, elements 0 and 1 of the former, 2 and 3 of the latter.
template <int D>
class RouteRows {
 public:
  int end[2];  // of the candidates of the lane's rows; init() where there are none

  __device__ RouteRows(const HopperRoute& p)
      : init_(p.init()),
        factor_(static_cast<float>(p.alpha_gamma[1] * (alpha_is_1(p) ? 1 : p.alpha_gamma[0] - 1) /
                                   (double{summary_scale} * sqrt(static_cast<double>(D))))) {}

  /// The lane's row i of the warpgroup's. Here and below, `thread` is for who reads the number anew
  /// each time, so that what follows from it does not stay in registers.
  __device__ static int lane_row(int i, uint32_t thread = threadIdx.x) {
    thread %= warpgroup;
    return thread / 32 * 16 + i * 8 + thread % 32 / 4;
  }
  /// Takes the rows of queries [first, first + count).
  __device__ void place(const HopperRoute& p, int first, int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = lane_row(i) / p.g;
      end[i] = query < count ? p.end(first + query) : init_;
    }
  }
  __device__ bool routes(int i) const {
    return end[i] > init_;
  }
  /// From their block in shared memory.
  __device__ void load(Block block, uint32_t thread = threadIdx.x) {
    const int row = thread % warpgroup / 32 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      block.left(q_[step], row, step, thread);
#pragma unroll
      for (uint32_t& both : q_[step]) {
        const __half2 pair =
            __floats2half2_rn(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
        both = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }

  /// z = q . 32 kbar of a tile in a stage, which may be written again on return.
  __device__ void multiply(float (&z)[8][4], uint32_t stage) const {
    const Block high{stage}, low{stage + D / 64 * panel_bytes};
    products_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      product_f16(z, q_[step], low.rows(step), step > 0);
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) product_f16(z, q_[step], high.rows(step), true);
    products_commit();
    products_wait<0>();
    pin(z);
  }
  /// From there to what entmax_float.cuh takes: -infinity where a row has no such candidate.
  __device__ void scale(float (&z)[8][4], int tile) const {
    scale(z);
    const int c0 = 64 * tile;
    const bool whole = c0 >= init_ && c0 + 64 <= min(end[0], end[1]);
    if (__all_sync(0xffffffffu, whole)) return;
    const int lane_c0 = c0 + static_cast<int>(threadIdx.x) % 4 * 2, from = init_ - lane_c0;
    const int to[2] = {end[0] - lane_c0, end[1] - lane_c0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = 8 * j + e % 2;
        if (c < from || c >= to[e / 2]) z[j][e] = -INFINITY;
      }
    }
  }
  /// The same where all are candidates.
  __device__ void scale(float (&z)[8][4]) const {
    // Not part of an fma, so that it has the same bits whatever a sweep makes of it.
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) z[j][e] = __fmul_rn(z[j][e], factor_);
    }
  }

 private:
  Fragment q_[D / 16];
  int init_;
  float factor_;

  __device__ static bool alpha_is_1(const HopperRoute& p) {
    return p.alpha_gamma[0] == 1;
  }
};

/// Numbers of a warpgroup's rows for a tile, in shared memory, on their way from rows to queries.
class RowTile {
 public:
  static constexpr int step = 72, bytes = 64 * step * 4;  // pairs of four rows in different banks

  __device__ explicit RowTile(void* at) : at_(static_cast<float*>(at)) {}
  __device__ float* at(int row, int column) const { return at_ + row * step + column; }
  /// The two of a row that the thread has in accumulators' columns [8 j, 8 j + 8).
  __device__ float2 pair(int row, int j) const {
    return *reinterpret_cast<const float2*>(at(row, 8 * j + static_cast<int>(threadIdx.x) % 4 * 2));
  }
  __device__ void put(const float (&p)[8][4]) const {
    const int thread = static_cast<int>(threadIdx.x) % warpgroup;
    float* to = at_ + (thread / 32 * 16 + thread % 32 / 4) * step + thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i * step + 8 * j) =
            make_float2(p[j][2 * i], p[j][2 * i + 1]);
      }
    }
  }
  /// The means over the heads of the warpgroup's query i, summed in their order, of the columns
  /// that a lane has of it: its own number and 32 more.
  __device__ float2 means(int i, int g) const {
    const float* from = at_ + i * g * step + static_cast<int>(threadIdx.x) % 32;
    float sum[2] = {0, 0};
#pragma unroll 4
    for (int h = 0; h < g; ++h) {
      sum[0] += from[h * step];
      sum[1] += from[h * step + 32];
    }
    const float share = 1 / static_cast<float>(g);
    return make_float2(sum[0] * share, sum[1] * share);
  }

 private:
  float* at_;
};

}  // namespace entrain::cuda
