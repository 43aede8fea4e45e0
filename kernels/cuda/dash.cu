// DashAttention's router (arXiv 2605.18753): entmax over chunk summaries and the prior that it puts
// on blocks. Scores never leave shared memory: what goes to global memory is tau, mask and bias.
#include <cmath>

#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/route_hopper.cuh"

namespace entrain {
namespace cuda {
namespace {

constexpr int threads = tile_threads, warps = threads / 32;

/// Grid: tiles, those with most candidates first, times kv heads and batch. Also counts what the
/// router reads. Products with summaries of two types take all registers: three words are spilled.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    route(const RouteProblem<T> p, double* tau, uint32_t* mask, int64_t half_words, float* bias,
          float* weights, double* read) {
  extern __shared__ __align__(16) double shared[];
  const RouteShape& s = p.shape;
  const int64_t heads = s.B * s.Hkv, head = blockIdx.x % heads;
  RouteTile<T> tile(p, shared);
  tile.load(head / s.Hkv, head % s.Hkv, s.tiles() - 1 - blockIdx.x / heads);
  tile.prepare();
  tile.find_thresholds();
  tile.weigh();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = s.z_step;
  const auto init = static_cast<int>(p.routing.init_blocks);
  for (int row = threadIdx.x; row < tile.rows(); row += threads) {
    tau[tile.at_row(row)] = tile.tau[row];
  }
  // log(w + eps) of the support takes the place of w, NaN elsewhere; extra: mu of each query.
  for (int i = warp; i < tile.count; i += warps) {
    double* row = tile.w + i * step;
    const int n = tile.n[i];
    for (int64_t c = lane; weights && c < s.M; c += 32) {
      const int64_t x = c - init;
      weights[tile.at_query(i) * s.M + c] = x >= 0 && x < n ? static_cast<float>(row[x]) : 0;
    }
    __syncwarp();  // other lanes' columns
    double mu = 0, support = 0;
    for (int c = lane; c < n; c += 32) {
      const bool is = row[c] > 0;
      const double l = is ? log(row[c] + p.routing.prior_eps) : NAN;
      row[c] = l;
      mu += is ? l : 0;
      support += is ? 1 : 0;
    }
    mu = warp_sum(mu);
    support = warp_sum(support);
    if (lane == 0) tile.extra[i] = p.routing.center && support > 0 ? mu / support : 0;
  }
  __syncthreads();

  const int64_t biases = (s.M + 31) / 32, pieces = half_words > biases ? half_words : biases;
  for (int64_t x = warp; x < tile.count * pieces; x += warps) {
    const auto i = static_cast<int>(x / pieces);
    const int64_t piece = x % pieces, c = piece * 32 + lane, own = tile.own(i);
    const int64_t column = c - init;
    const double l = column >= 0 && column < tile.n[i] ? tile.w[i * step + column] : NAN;
    const bool routed = l == l;
    const bool forced = c <= own && (c < init || c > own - p.routing.local_blocks);
    const unsigned bits = __ballot_sync(0xffffffffu, routed || forced);
    if (lane == 0 && piece < half_words) mask[tile.at_query(i) * half_words + piece] = bits;
    if (c < s.M) {
      bias[tile.at_query(i) * s.M + c] =
          routed ? static_cast<float>((l - tile.extra[i]) / p.routing.sigma) : 0;
    }
  }

  if (!read || threadIdx.x != 0) return;
  int64_t entries = 0;  // whole numbers: the order of adding them does not show
  for (int i = 0; i < tile.count; ++i) entries += tile.n[i];
  double* fields = read + tile.r * read_fields;
  atomicAdd(fields + read_router, static_cast<double>(entries));
  atomicAdd(fields + read_flops, static_cast<double>((2 + 4) * entries * s.g * s.D));
}

__device__ double entropy_term(double p) {
  return p > 0 ? -p * log(p) : 0;
}

/// Grid: tiles. A block goes over the whole batch for its positions: sums are in order.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    routing_entropy(const RouteProblem<T> p, const double* tau, double* entropy) {
  extern __shared__ __align__(16) double shared[];
  const RouteShape& s = p.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = s.g, step = s.z_step;
  RouteTile<T> tile(p, shared);
  const double sharpen = tile.softmax_first ? tile.gamma : 1;
  for (int64_t head = 0; head < s.B * s.Hkv; ++head) {
    __syncthreads();  // the last head is done with
    tile.load(head / s.Hkv, head % s.Hkv, blockIdx.x);
    if (tile.width == 0) return;
    tile.for_rows(tile.rows(), [&](int row, bool is) {
      const double* z = tile.z + row * step;
      const int n = is ? tile.n[row / g] : 0;
      const double top = row_top(z, n, tile.lanes);
      const double sum = sum_of_powers(z, n, sharpen, top, tile.lanes);
      if (is && tile.lanes.rank == 0) tile.extra[row] = sharpen * top + log(g * sum);
    });
    __syncthreads();
    for (int i = warp; i < tile.count; i += warps) {
      double sum = 0;
      for (int c = lane; c < tile.n[i]; c += 32) {
        double mean = 0;
        for (int row = i * g; row < (i + 1) * g; ++row) {
          mean += exp(sharpen * tile.z[row * step + c] - tile.extra[row]);
        }
        sum += entropy_term(mean);
      }
      sum = warp_sum(sum);
      if (lane != 0 || tile.n[i] == 0) continue;
      double* fields = entropy + (tile.first + i) * entropy_fields;
      fields[entropy_queries] += 1;
      fields[entropy_candidates] += tile.n[i];
      fields[entropy_softmax] += sum;
    }
    __syncthreads();
    tile.prepare();
    tile.load_thresholds(tau);
    tile.weigh();
    for (int i = warp; i < tile.count; i += warps) {
      double sum = 0;
      for (int c = lane; c < tile.n[i]; c += 32) sum += entropy_term(tile.w[i * step + c]);
      sum = warp_sum(sum);
      if (lane == 0) entropy[(tile.first + i) * entropy_fields + entropy_routing] += sum;
    }
  }
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <>
void Kernels<Device::cuda>::dash_route(Tensor q, Tensor kbar, const DashRouting& routing,
                                       Tensor tau, const BlockSet& blocks, Tensor weights,
                                       Tensor scratch, Tensor read, bool beside) const {
  if (q.numel() == 0) return;
  if (route_decode(q, kbar, routing, tau, blocks, weights, read, beside)) return;
  if (scratch && route_hopper(q, kbar, routing, tau, blocks, weights, scratch, read)) return;
  if (route_bf16(q, kbar, routing, tau, blocks, weights, read)) return;
  const RouteShape s = route_shape(q, kbar, routing, blocks.first);
  const auto grid = static_cast<unsigned>(s.tiles() * s.B * s.Hkv);
  auto* mask = reinterpret_cast<uint32_t*>(pointer<uint64_t>(blocks.mask));
  by_type(q, [&]<class T>(T) {
    launch_tiles("route", route<T>, dim3(grid), s.bytes,
                 route_problem<T>(s, q, kbar, routing, blocks.first), pointer<double>(tau), mask,
                 2 * blocks.mask[3], pointer<float>(blocks.bias), pointer<float>(weights),
                 pointer<double>(read));
  });
}

template <>
int64_t Kernels<Device::cuda>::dash_route_scratch(const Shape&, const Shape& kbar) {
  return Summaries::scratch(kbar);
}

template <>
void Kernels<Device::cuda>::dash_entropy(Tensor q, Tensor kbar, const DashRouting& routing,
                                         Tensor tau, Tensor entropy) const {
  if (q.numel() == 0) return;
  const RouteShape s = route_shape(q, kbar, routing, 0);
  by_type(q, [&]<class T>(T) {
    launch_tiles("routing_entropy", routing_entropy<T>, dim3(static_cast<unsigned>(s.tiles())),
                 s.bytes, route_problem<T>(s, q, kbar, routing, 0), pointer<double>(tau),
                 pointer<double>(entropy));
  });
}

}  // namespace entrain
