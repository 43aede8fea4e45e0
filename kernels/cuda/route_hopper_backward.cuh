#pragma once
// What the kernels of the router's way back on Hopper share. With z the scores of a row as
// entmax takes them, and threshold tau's,
//
//   p = entmax(z; threshold),  s = p^(2 - alpha),  dz = s (dw - centre),  centre = sum s dw / sum
//   s, dq += scale dz kbar,       dkbar = scale dz^T q.
//
// route_hopper_dw.cu leaves dw, one for all heads of a query, and what the queries of a row tile,
// 64 / g neighbours of a kv head with their g heads, route to together; route_hopper_gradients.cu
// computes the scores of that anew, dq, and parts of dkbar, which route_hopper_backward.cu adds up.
#include "kernels/cuda/route_hopper.cuh"

namespace entrain::cuda {

/// The way back as kernels take it.
struct HopperRouteBackward {
  int heads;             // B Hkv
  int tiles, row_tiles;  // 64 chunks; the rows of 64 / g queries
  int run, parts;        // row tiles side by side; the x-th part sums dkbar over the x-th run from
                         // the start and the x-th from the end
  HopperRoute route = {};
  const bf16* summaries = nullptr;  // [3, heads, M, D]: as Summaries
  const double* tau = nullptr;      // [B, Hq, N]
  const uint64_t* mask = nullptr;   // [B, Hkv, N, words]
  int words = 0;
  const float* bias = nullptr;  // [B, Hkv, N, M]
  float* dbias = nullptr;       // [B, Hkv, N, M]: D, then dw on the support
  uint64_t* unions = nullptr;   // [heads, row_tiles, tiles], in tiles with candidates
  uint64_t* summed = nullptr;   // [heads, parts, tiles]: the chunks that a part has sums of
  float* sums = nullptr;        // [heads, parts, M, D]: parts of dkbar / scale

  /// A query's support in a tile; at: where the query is in [B, Hkv, N], end: of its candidates.
  __device__ uint64_t support(int64_t at, int end, int tile) const {
    return mask[at * words + tile] & chunks_before(end, tile) & ~chunks_before(route.init(), tile);
  }
  __device__ uint64_t* union_of(int head, int row_tile) const {
    return unions + (int64_t{head} * row_tiles + row_tile) * tiles;
  }
  __device__ int64_t part_of(int head, int part) const { return int64_t{head} * parts + part; }
  /// The x-th row tile of a part, or, after its last, as many as there are, or more.
  __device__ int row_tile(int part, int x) const {
    if (x == 2 * run) return row_tiles;
    return x < run ? part * run + x : (2 * parts - 2 - part) * run + x;
  }
  /// Of summaries, and of a part's sums.
  __device__ int64_t elements_of_head() const { return int64_t{route.M} * route.D; }
};

/// dw and the unions; route_hopper_dw.cu.
void hopper_route_dw(const HopperRouteBackward& p);
/// dq and the parts' sums; route_hopper_gradients.cu.
void hopper_route_gradients(const HopperRouteBackward& p, const Rows<bf16>& q,
                            const Rows<bf16>& dq);

}  // namespace entrain::cuda
