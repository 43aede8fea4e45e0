// The way back through DashAttention's router on Hopper, first kernel: from D, the sums of dS,
// to gradients of the routing weights, and what the queries of a row tile route to together.
//
// The weights are not computed anew. On a query's support S the bias is (log(w + eps) - mu) /
// sigma, and the weights there sum to 1, so that with e = exp(sigma bias), whatever mu is,
//
//   w + eps = e (1 + |S| eps) / sum_S e,   dw = (D - mean_S D) / (sigma g (w + eps)).
//
// |sigma bias| < 81, as least_weight is 1e-35: all of these are normal floats, and dw errs by 1e-5.
//
// A thread block takes a row tile, a warp a query, lanes along the chunks: it reads the mask, and
// of bias and D what lies in the support, twice where there are more than 256 chunks. Floor for
// B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64: 1 MB of mask, sectors of 32 bytes around the
// support of three tensors, 50 MB at density 0.125, 17 us; B 4, Hkv 4: some 8 times that. An
// H100 takes 26 and 159 us.
#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps;

/// What a lane has of four tiles: of each half of them a chunk.
struct Chunks {
  static constexpr int tiles = 4;
  bool routed[2 * tiles];
  float l[2 * tiles], d[2 * tiles];  // sigma bias in base 2, D; off the support -infinity, 0
};

/// dw of a query that has so many candidates, in D's place; off the support D, which is 0 or of
/// forced blocks, stays.
__device__ void put_weight_gradients(const HopperRouteBackward& p, int64_t at, int candidates) {
  const DashRouting& routing = p.route.routing;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int init = p.route.init();
  const int begin = p.route.first_tile();
  const int end = candidates > 0 ? (init + candidates + 63) / 64 : begin;
  const auto sharpen = static_cast<float>(routing.sigma * 1.4426950408889634);
  const float* const bias = p.bias + at * p.route.M;
  float* const sums = p.dbias + at * p.route.M;
  // Calls f(words, tile) where the mask has any of the four tiles from `tile` on; words: theirs are
  // lanes' tile - begin and the next ones', modulo 32.
  const auto for_mask = [&](auto f) {
    for (int from = begin; from < end; from += 32) {
      const uint64_t words = from + lane < end ? p.mask[at * p.words + from + lane] : 0;
      uint32_t any = __ballot_sync(~0u, words != 0);
      while (any != 0) {
        const int x = (__ffs(static_cast<int>(any)) - 1) / Chunks::tiles * Chunks::tiles;
        any &= ~(((1u << Chunks::tiles) - 1) << x);
        f(words, from + x);
      }
    }
  };
  const auto load = [&](uint64_t words, int tile) {
    Chunks chunks;
#pragma unroll
    for (int x = 0; x < 2 * Chunks::tiles; ++x) {
      const auto half = static_cast<uint32_t>(words >> 32 * (x % 2));
      const uint32_t bits = __shfl_sync(~0u, half, tile - begin + x / 2);
      const int candidate = 64 * tile + 32 * x + lane - init;
      chunks.routed[x] = (bits >> lane & 1) != 0 &&
                         static_cast<uint32_t>(candidate) < static_cast<uint32_t>(candidates);
    }
#pragma unroll
    for (int x = 0; x < 2 * Chunks::tiles; ++x) {
      const int c = 64 * tile + 32 * x + lane;
      chunks.l[x] = chunks.routed[x] ? sharpen * bias[c] : -INFINITY;
      chunks.d[x] = chunks.routed[x] ? sums[c] : 0;
    }
    return chunks;
  };
  Chunks chunks = {};
  float powers = 0, sum = 0;
  int size = 0;
  for_mask([&](uint64_t words, int tile) {
    chunks = load(words, tile);
#pragma unroll
    for (int x = 0; x < 2 * Chunks::tiles; ++x) {
      powers += power_of_2(chunks.l[x]);
      sum += chunks.d[x];
      size += chunks.routed[x];
    }
  });
  powers = warp_sum(powers);
  sum = warp_sum(sum);
  const auto support = static_cast<float>(__reduce_add_sync(~0u, size));
  const float mean = routing.center && support > 0 ? __fdividef(sum, support) : 0;
  const auto sigma_g = static_cast<float>(routing.sigma * p.route.g);
  const auto eps = static_cast<float>(routing.prior_eps);
  const float share = __fdividef(powers, (1 + support * eps) * sigma_g);
  const auto put = [&](const Chunks& of, int tile) {
#pragma unroll
    for (int x = 0; x < 2 * Chunks::tiles; ++x) {
      if (of.routed[x]) {
        sums[64 * tile + 32 * x + lane] = share * power_of_2(-of.l[x]) * (of.d[x] - mean);
      }
    }
  };
  if (end - begin <= Chunks::tiles) return put(chunks, begin);
  for_mask([&](uint64_t words, int tile) { put(load(words, tile), tile); });
}

/// The union of what so many queries route to, the last of which has candidates up to a tile;
/// candidates: of the warp's i-th query, in lane i.
__device__ void put_union(const HopperRouteBackward& p, int64_t at, int count, int end,
                          int candidates, uint64_t* to) {
  __shared__ uint64_t parts[warps][32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int from = p.route.first_tile(); from < end; from += 32) {
    const int tile = from + lane;
    uint64_t any = 0;
    for (int i = 0; warps * i + warp < count; ++i) {
      const int query_end = p.route.init() + __shfl_sync(~0u, candidates, i);
      if (tile < end) any |= p.support(at + warps * i + warp, query_end, tile);
    }
    __syncthreads();  // the last parts are done with
    parts[warp][lane] = any;
    __syncthreads();
    if (warp > 0 || tile >= end) continue;
    for (int i = 1; i < warps; ++i) any |= parts[i][lane];
    to[tile] = any;
  }
}

/// Grid: row tiles times kv heads and batch, those with most candidates first.
__global__ void __launch_bounds__(threads)
    weight_gradients(const __grid_constant__ HopperRouteBackward p) {
  const auto index = static_cast<int>(blockIdx.x);
  const int head = index % p.heads, row_tile = p.row_tiles - 1 - index / p.heads;
  const int first = row_tile * p.route.queries, count = min(p.route.queries, p.route.N - first);
  const int64_t at = int64_t{head} * p.route.N + first;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Of the queries of a warp, 16 at most, each found by a lane.
  const int candidates = p.route.end(first + min(warps * lane + warp, count - 1)) - p.route.init();
  put_union(p, at, count, p.route.end_tile(first + count - 1), candidates,
            p.union_of(head, row_tile));
  for (int i = 0; warps * i + warp < count; ++i) {
    put_weight_gradients(p, at + warps * i + warp, __shfl_sync(~0u, candidates, i));
  }
}

}  // namespace

void hopper_route_dw(const HopperRouteBackward& p) {
  launch("route_backward: dw", weight_gradients, int64_t{p.heads} * p.row_tiles, threads, 0, p);
}

}  // namespace entrain::cuda
