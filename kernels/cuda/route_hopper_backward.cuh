#pragma once
// What the two halves of the router's way back on Hopper share (route_hopper_backward.cu,
// route_hopper_dkbar.cu). With z the scores of a row as entmax takes them,
//
//   p = entmax(z; threshold),  dz = s (dw - centre),  s = p^(2 - alpha),
//   dq += scale dz kbar,       dkbar = scale dz^T q.
//
// The first half leaves dw, one for all heads of a query, and a few numbers of each row to the
// second. Both compute the scores anew.
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
  const double* tau = nullptr;  // [B, Hq, N]
  float* dbias = nullptr;       // [B, Hkv, N, M]: D, then dw in tiles with candidates
  RowNumbers* rows = nullptr;   // [heads, row_tiles, 64]
  float* factors = nullptr;     // [warpgroups that run, 64 / g, tiles, 64]
  float* sums = nullptr;        // [heads, segments, tiles, 64, D]: parts of dkbar / scale

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

/// dkbar; route_hopper_dkbar.cu.
void hopper_route_dkbar(const HopperRouteBackward& p, const CUtensorMap& q,
                        const Summaries& summaries, double* dkbar);

/// Starts copies of a tile's columns of the warpgroup's rows of dbias, `count` queries from `from`
/// on, to the first rows of a table; zeros after the last query and chunk.
__device__ __forceinline__ void copy_columns(const RowTile& to, const float* from,
                                             const HopperRoute& p, int tile, int count) {
  const int column = static_cast<int>(threadIdx.x) % 64, c = 64 * tile + column;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) % warpgroup / 64; i < p.queries; i += 2) {
    copy_async<4>(shared_address(to.at(i, column)), from + int64_t{i} * p.M + c,
                  i < count && c < p.M);
  }
}

/// From a tile's scores to their gradients. row: of dw, for the thread's two rows.
template <class Entmax>
__device__ __forceinline__ void score_gradients(float (&z)[8][4], const Entmax& entmax,
                                                const RowNumbers (&numbers)[2], const RowTile& dw,
                                                const int (&row)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float threshold = numbers[i].threshold, centre = numbers[i].centre;
      const float2 d = dw.pair(row[i], j);
      float* both = &z[j][2 * i];
      both[0] = entmax.weight(both[0], threshold) * (d.x - centre);
      both[1] = entmax.weight(both[1], threshold) * (d.y - centre);
    }
  }
}

/// Writes an accumulator, rounded, to a block of one panel.
__device__ __forceinline__ void put_rounded(const float (&from)[8][4], char* to) {
  const int thread = static_cast<int>(threadIdx.x) % warpgroup;
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    char* at = to + row * 128 + (j ^ row % 8) * 16 + thread % 4 * 4;
    *reinterpret_cast<uint32_t*>(at) = pack(from[j][0], from[j][1]);
    *reinterpret_cast<uint32_t*>(at + 8 * 128) = pack(from[j][2], from[j][3]);
  }
}

}  // namespace entrain::cuda
