// DashAttention's router for bf16 queries: a block takes a tile of queries of one kv head.
//
//   scores (tensor cores) -> z, shared -> thresholds (eight lanes a row) -> w, mask, bias (a warp a
//   query, lanes along the chunks: a ballot makes a word of the mask, stores are whole lines)
//
// Predicted for B 2, N 16384, 12/4 heads of 64, chunks of 64 on an H100, where double took 1.84 ms:
// scores, three bf16 products each, 35 us; splitting summaries 20; thresholds, about four passes of
// four operations an entry, 30; weights and logarithms 25; 134 MB of bias 45. Two blocks a
// multiprocessor overlap some of it: 0.12 to 0.2 ms. Measured, summaries included, in a training
// step with gamma 20 and random weights: 1.15 ms. Forward and backward on inputs that neighbours
// share, at density 0.125: 2.2 ms, of which the model explains a fifth; not profiled yet.
#include "kernels/cuda/dash_bf16.cuh"

namespace entrain::cuda {
namespace {

constexpr int row_tiles = 6;  // a tile has 96 rows, which read the summaries once from L2

template <class Entmax>
__device__ void find_thresholds(const Bf16RouteTile& tile, const Entmax& entmax) {
  tile.for_rows([&](int row) {
    const int n = tile.n[row];
    const float t = entmax.threshold(tile.scores(row), n, row_top(tile.scores(row), n) - 1);
    if (tile.lane() % row_lanes == 0) tile.tau[row] = n > 0 ? t : 0;
  });
}

/// Mask and bias of query i; log(w + eps) of the support waits for its mean where the scores of the
/// first head were, NaN elsewhere. Lanes read again only what they wrote.
template <class Entmax>
__device__ void put_query(const Bf16RouteTile& tile, const Entmax& entmax, int i,
                          const RouteOutput& out) {
  const DashRouting& routing = tile.p.routing;
  const auto M = static_cast<int>(tile.p.shape.M), init = static_cast<int>(routing.init_blocks);
  const auto local = static_cast<int>(routing.local_blocks);
  const auto eps = static_cast<float>(routing.prior_eps);
  const int n = tile.n[i * tile.p.shape.g], own = tile.own[i], lane = tile.lane();
  uint32_t* mask = out.mask + tile.at_query(i) * out.half_words;
  float* bias = out.bias + tile.at_query(i) * M;
  float* weights = out.weights ? out.weights + tile.at_query(i) * M : nullptr;
  float* logs = tile.scores(i * tile.p.shape.g);
  float mu = 0;
  int support = 0;
  for (int piece = 0; piece < out.half_words || 32 * piece < M; ++piece) {
    const int c = 32 * piece + lane, column = c - init;
    const bool candidate = column >= 0 && column < n;
    const float w = candidate ? tile.weight(entmax, i, column) : 0;
    const bool routed = w > least_weight;
    const bool forced = c <= own && (c < init || c > own - local);
    const float l = routed ? __logf(w + eps) : 0;
    if (candidate) logs[column] = routed ? l : NAN;
    if (weights && c < M) weights[c] = w;
    mu += l;
    support += __popc(__ballot_sync(0xffffffffu, routed));
    const unsigned bits = __ballot_sync(0xffffffffu, routed || forced);
    if (lane == 0 && piece < out.half_words) mask[piece] = bits;
  }
  mu = warp_sum(mu);
  mu = routing.center && support > 0 ? mu / static_cast<float>(support) : 0;
  const auto share = static_cast<float>(1 / routing.sigma);
  for (int c = lane; c < M; c += 32) {
    const int column = c - init;
    const float l = column >= 0 && column < n ? logs[column] : NAN;
    bias[c] = l == l ? (l - mu) * share : 0;
  }
}

__device__ void count_reads(const Bf16RouteTile& tile, double* read) {
  const Bf16RouteShape& s = tile.p.shape;
  int entries = 0;  // whole numbers: the order of adding them does not show
  for (int i = tile.lane(); i < tile.count; i += 32) entries += tile.n[i * s.g];
  entries = __reduce_add_sync(0xffffffffu, entries);
  if (tile.lane() != 0) return;
  double* fields = read + tile.r * read_fields;
  atomicAdd(fields + read_router, static_cast<double>(entries));
  atomicAdd(fields + read_flops, static_cast<double>(int64_t{6} * entries * s.g * s.D));
}

/// Grid: tiles, those with most candidates first, times kv heads and batch.
__global__ void __launch_bounds__(bf16_threads, 2)
    route(const Bf16RouteProblem p, const RouteOutput out) {
  const Bf16RouteShape& s = p.shape;
  const int64_t heads = s.B * s.Hkv, head = blockIdx.x % heads;
  Bf16RouteTile tile(p, dynamic_shared());
  tile.load<row_tiles>(head / s.Hkv, head % s.Hkv, s.tiles() - 1 - blockIdx.x / heads);
  by_curve(tile.alpha, [&](const auto& entmax) {
    find_thresholds(tile, entmax);
    __syncthreads();
    for (int i = tile.warp(); i < tile.count; i += bf16_warps) put_query(tile, entmax, i, out);
  });
  tile.for_thresholds([&](int h, int i, int row) {
    out.tau[tile.at_row(i, h)] = static_cast<double>(tile.tau[row]);
  });
  if (out.read && tile.warp() == 0) count_reads(tile, out.read);
}

}  // namespace

bool route_bf16(const Tensor& q, const Tensor& kbar, const DashRouting& routing, const Tensor& tau,
                const BlockSet& blocks, const Tensor& weights, const Tensor& read) {
  const Bf16RouteShape s = bf16_route_shape(q, kbar, routing, blocks.first, row_tiles, false);
  if (s.bytes == 0) return false;
  launch("route", route, s.tiles() * s.B * s.Hkv, bf16_threads, static_cast<size_t>(s.bytes),
         bf16_route_problem(s, q, kbar, routing, blocks.first),
         RouteOutput(tau, blocks, weights, read));
  return true;
}

}  // namespace entrain::cuda
