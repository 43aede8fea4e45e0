#pragma once
// What the three parts of the router's way back on Hopper share. With z the scores of a row as
// entmax takes them, and threshold tau's,
//
//   p = entmax(z; threshold),  s = p^(2 - alpha),  dz = s (dw - centre),  centre = sum s dw / sum
//   s, dq += scale dz kbar,       dkbar = scale dz^T q.
//
// route_hopper_dw.cu leaves dw, one for all heads of a query, and the unions of supports,
// route_hopper_backward.cu dq and the centres, route_hopper_dkbar.cu dkbar. The latter two compute
// scores anew.
#include "kernels/cuda/route_hopper.cuh"

namespace entrain::cuda {

/// What is known of a row's scores; `end` as in RouteRows.
struct alignas(16) RowNumbers {
  float threshold, centre;
  int end;
};

/// The way back as kernels take it.
struct HopperRouteBackward {
  int heads;              // B Hkv
  int tiles, row_tiles;   // 64 chunks, the rows of 64 / g queries
  int segment, segments;  // row tiles whose part of dkbar is summed by itself; how many
  HopperRoute route = {};
  const bf16* summaries = nullptr;  // [3, heads, M, D]: as Summaries
  const double* tau = nullptr;      // [B, Hq, N]
  const uint64_t* mask = nullptr;   // [B, Hkv, N, words]
  int words = 0;
  const float* bias = nullptr;  // [B, Hkv, N, M]
  float* dbias = nullptr;       // [B, Hkv, N, M]: D, then dw on the support
  uint64_t* unions = nullptr;   // [heads, row_tiles, tiles], in tiles with candidates
  RowNumbers* rows = nullptr;   // [heads, row_tiles, 64]
  float* sums = nullptr;        // [heads, segments, tiles, 64, D]: parts of dkbar / scale

  /// A query's support in a tile; at: where the query is in [B, Hkv, N].
  __device__ uint64_t support(int64_t at, int query, int tile) const {
    const auto before = [tile](int c) {
      const int bits = c - 64 * tile;
      return bits <= 0 ? 0 : bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    };
    return mask[at * words + tile] & before(route.end(query)) & ~before(route.init());
  }
  /// Of a head, of the first part; the others follow, each a step on.
  __device__ const bf16* summaries_of(int head) const {
    return summaries + int64_t{head} * route.M * route.D;
  }
  __device__ int64_t summaries_step() const { return int64_t{heads} * route.M * route.D; }
  __device__ uint64_t* union_of(int head, int row_tile) const {
    return unions + (int64_t{head} * row_tiles + row_tile) * tiles;
  }
  __device__ RowNumbers* rows_of(const RouteItem& item, int row_tile) const {
    const int head = item.b * route.Hkv + item.r;
    return rows + (int64_t{head} * row_tiles + row_tile) * block_rows;
  }
  __device__ float* dbias_of(const RouteItem& item, int query) const {
    return dbias + route.at_query(item, query) * route.M;
  }
  __device__ float* sums_of(int head, int at, int tile) const {
    return sums + ((int64_t{head} * segments + at) * tiles + tile) * block_rows * route.D;
  }
  /// The first with a query that has candidates in a tile of chunks; row_tiles: none.
  __device__ int first_row_tile(int tile) const {
    const DashRouting& routing = route.routing;
    const int64_t candidate = max(64 * tile, route.init());
    const int64_t query = (candidate + max(routing.local_blocks, int64_t{1})) * routing.chunk;
    if (candidate >= 64 * tile + 64 || query >= route.N) return row_tiles;
    return static_cast<int>(query) / route.queries;
  }
};

/// dw and the unions; route_hopper_dw.cu.
void hopper_route_dw(const HopperRouteBackward& p);
/// dkbar; route_hopper_dkbar.cu.
void hopper_route_dkbar(const HopperRouteBackward& p, const CUtensorMap& q,
                        const Summaries& summaries, double* dkbar);

}  // namespace entrain::cuda
