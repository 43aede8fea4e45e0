// The way back through DashAttention's router (arXiv 2605.18753): from the sums of dS over blocks
// to queries and summaries. Scores are computed anew, tile by tile. Gradients are 0 off the
// support, so both products go over the columns, 8 candidates at a time, in which any row of the
// tile has one.
#include <cmath>

#include "kernels/cuda/dash_bf16.cuh"

namespace entrain {
namespace cuda {
namespace {

constexpr int threads = tile_threads, warps = threads / 32;

/// From dbias to the gradients that entmax, or where softmax comes first all heads' softmax, hands
/// back; they take the place of w. dl_c = (D_c - mean D) / sigma on the support, dw_c = dl_c / (w_c
/// + eps). A warp takes a query.
template <class T>
__device__ void weights_backward(const RouteTile<T>& tile, const float* dbias) {
  const DashRouting& routing = tile.p.routing;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < tile.count; i += warps) {
    const float* sums = dbias + tile.at_query(i) * tile.p.shape.M + routing.init_blocks;
    double* w = tile.w + i * tile.p.shape.z_step;
    const int n = tile.n[i];
    double mean = 0, support = 0;  // sums is 0 off the support
    for (int c = lane; c < n; c += 32) {
      mean += sums[c];
      support += w[c] > 0 ? 1 : 0;
    }
    mean = warp_sum(mean);
    support = warp_sum(support);
    mean = routing.center && support > 0 ? mean / support : 0;
    auto dw = [&](int c) {
      return w[c] > 0 ? (sums[c] - mean) / (routing.sigma * (w[c] + routing.prior_eps)) : 0.0;
    };
    if (!tile.softmax_first) {
      for (int c = lane; c < n; c += 32) w[c] = dw(c) / tile.p.shape.g;
      continue;
    }
    double total = 0, weighted = 0;
    for (int c = lane; c < n; c += 32) {
      const double s = tile.entmax.weight(w[c]);
      total += s;
      weighted += s * dw(c);
    }
    total = warp_sum(total);
    weighted = warp_sum(weighted);
    const double centre = total > 0 ? weighted / total : 0;
    for (int c = lane; c < n; c += 32) w[c] = tile.entmax.weight(w[c]) * (dw(c) - centre);
  }
  __syncthreads();
}

/// From there to the gradients of the scores, which take the scores' place: 0 where a query has no
/// such candidate, up to a multiple of 16 columns. Lists the columns, 8 at a time, that have any.
template <class T>
__device__ void scores_backward(const RouteTile<T>& tile) {
  const RouteShape& s = tile.p.shape;
  const Lanes& lanes = tile.lanes;
  const int padded = (tile.width + 15) / 16 * 16;
  const double share = tile.softmax_first ? tile.gamma / s.g : 1;
  for (int x = threadIdx.x; x < padded / 8; x += threads) tile.active[x] = 0;
  __syncthreads();
  tile.for_rows(tile.rows(), [&](int row, bool is) {
    const int n = is ? tile.n[row / s.g] : 0;
    const double* dw = tile.w + row / s.g * s.z_step;
    double* dz = tile.z + row * s.z_step;
    double total = 0, weighted = 0;
    for (int c = lanes.rank; c < n; c += lanes.width) {
      dz[c] = tile.softmax_first ? dz[c] : tile.entmax.weight(dz[c], tile.tau[row]);
      total += dz[c];
      weighted += dz[c] * dw[c];
    }
    total = lanes.sum(total);  // 1 for a softmax
    weighted = lanes.sum(weighted);
    const double centre = tile.softmax_first ? weighted : (total > 0 ? weighted / total : 0);
    for (int c = lanes.rank; is && c < padded; c += lanes.width) {
      dz[c] = c < n ? share * dz[c] * (dw[c] - centre) : 0;
      if (dz[c] != 0) tile.active[c / 8] = 1;
    }
  });
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int found = 0;
    for (int x = 0; x < padded / 8; x += 32) {
      const bool is = x + lane < padded / 8 && tile.active[x + lane] != 0;
      const unsigned all = __ballot_sync(0xffffffffu, is);
      if (is) tile.active_list[found + __popc(all & ((1u << lane) - 1))] = x + lane;
      found += __popc(all);
    }
    if (lane == 0) *tile.n_active = found;
  }
  __syncthreads();
}

/// dq += scale dz kbar: a warp takes 32 rows and 16 dimensions, over the active columns.
template <class T>
__device__ void add_dq(const RouteTile<T>& tile, const Rows<T>& dq) {
  const RouteShape& s = tile.p.shape;
  const int warp = threadIdx.x / 32, x = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int rows = tile.rows(), row_items = (rows + 31) / 32, active = *tile.n_active;
  const int items = row_items * ((s.D + 15) / 16);
  const int* list = tile.active_list;
  const double* kbar = tile.kbar();
  for (int item = warp; item < items; item += warps) {
    const int m = item % row_items * 32, d0 = item / row_items * 16;
    const double* dz[4];  // rows that do not exist repeat the last
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = m + 8 * i + x;
      dz[i] = tile.z + (row < rows ? row : rows - 1) * s.z_step;
    }
    auto load_kbar = [&](double(&to)[2][2], int j) {
      const int c = j < active ? list[j] * 8 + 2 * t : tile.width;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = d0 + i / 2 * 8 + x;
        const bool within = c + i % 2 < tile.width && d < s.D;
        to[i / 2][i % 2] = within ? kbar[(c + i % 2) * tile.p.kbar.token_step + d] : 0;
      }
    };
    double sum[2][2][4] = {}, kb[2][2], next[2][2];
    load_kbar(kb, 0);
#pragma unroll 1
    for (int j = 0; j < active; ++j) {
      load_kbar(next, j + 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        double a[4];
        load_rows(a, dz[2 * i] + list[j] * 8, dz[2 * i + 1] + list[j] * 8);
        multiply(sum[i][0], a, kb[0]);
        multiply(sum[i][1], a, kb[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) kb[i / 2][i % 2] = next[i / 2][i % 2];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 8 (i / 2): rows; 8 (i % 2): dimensions
      const int row = m + i / 2 * 8 + x, d = d0 + i % 2 * 8 + 2 * t;
      if (row >= rows || d >= s.D) continue;
      const double* pair = sum[i / 4][i % 2] + i / 2 % 2 * 2;
      T* at = dq.at(tile.b, tile.r * s.g + row % s.g, tile.first + row / s.g) + d;
      auto old = *reinterpret_cast<Pack<T, 2>*>(at);
      for (int e = 0; e < 2; ++e) {
        old.at[e] = from_float<T>(static_cast<float>(to_float(old.at[e]) + tile.scale * pair[e]));
      }
      *reinterpret_cast<Pack<T, 2>*>(at) = old;
    }
  }
}

/// sums [M, D] += dz^T q, q carrying the scale already: a warp takes two times 8 active columns and
/// 32 dimensions. No other block adds to these sums.
template <class T>
__device__ void add_dkbar(const RouteTile<T>& tile, double* sums) {
  const RouteShape& s = tile.p.shape;
  const int warp = threadIdx.x / 32, x = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int rows = tile.rows(), active = *tile.n_active, pairs = (active + 1) / 2;
  const int* list = tile.active_list;
  for (int item = warp; item < pairs * ((s.D + 31) / 32); item += warps) {
    const int pair = item % pairs * 2, d0 = item / pairs * 32;
    const bool two = pair + 1 < active;
    const int column[2] = {list[pair] * 8 + x, two ? list[pair + 1] * 8 + x : 0};
    double sum[4][4] = {};
#pragma unroll 1
    for (int k = 0; k < rows; k += 8) {
      double a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = k + 2 * t + i / 2;
        const bool within = row < rows && (i % 2 == 0 || two);
        a[i] = within ? tile.z[row * s.z_step + column[i % 2]] : 0;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int d = d0 + 8 * j + x;
        double qs[2] = {0, 0};
        if (d < s.D) {  // rows up to a multiple of 16 hold 0
          qs[0] = tile.q[(k + 2 * t) * s.q_step + d];
          qs[1] = tile.q[(k + 2 * t + 1) * s.q_step + d];
        }
        multiply(sum[j], a, qs);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 8 (i / 2): dimensions; i % 2: which columns
      const int d = d0 + i / 2 * 8 + 2 * t, c = column[i % 2];
      if (d >= s.D || c >= tile.width || (i % 2 == 1 && !two)) continue;
      auto* at = reinterpret_cast<double2*>(sums + (tile.p.routing.init_blocks + c) * s.D + d);
      double2 old = *at;
      old.x += sum[i / 2][i % 2 * 2];
      old.y += sum[i / 2][i % 2 * 2 + 1];
      *at = old;
    }
  }
}

/// Grid (parts, Hkv, B): a block goes over every parts-th tile of one kv head and sums its dkbar in
/// its own [M, D] of sums.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    route_backward(const RouteProblem<T> p, const double* tau, const float* dbias, Rows<T> dq,
                   double* sums) {
  extern __shared__ __align__(16) double shared[];
  const RouteShape& s = p.shape;
  const int64_t b = blockIdx.z, r = blockIdx.y, per_head = s.M * s.D;
  sums += ((b * s.Hkv + r) * gridDim.x + blockIdx.x) * per_head;
  for (int64_t x = threadIdx.x; x < per_head; x += threads) sums[x] = 0;
  RouteTile<T> tile(p, shared);
  for (int64_t t = blockIdx.x; t < s.tiles(); t += gridDim.x) {
    __syncthreads();  // the last tile is done with
    tile.load(b, r, t);
    if (tile.width == 0) continue;
    tile.prepare();
    tile.load_thresholds(tau);
    tile.weigh();
    weights_backward(tile, dbias);
    scores_backward(tile);
    add_dq(tile, dq);
    add_dkbar(tile, sums);
  }
}

/// dkbar [heads, n] = the parts' sums [heads, parts, n], in order.
__global__ void __launch_bounds__(threads)
    sum_parts(const double* sums, int64_t parts, int64_t n, int64_t total, double* dkbar) {
  const int64_t x = int64_t{blockIdx.x} * threads + threadIdx.x;
  if (x >= total) return;
  const double* part = sums + x / n * parts * n + x % n;
  double sum = part[0];
  for (int64_t i = 1; i < parts; ++i) sum += part[i * n];
  dkbar[x] = sum;
}

/// Blocks that share a kv head's tiles in the backward pass: two for each multiprocessor of an H100
/// in all, on any GPU, so that sums do not depend on it.
int64_t backward_parts(const Shape& q, const Shape& kbar) {
  const int64_t heads = std::max<int64_t>(1, kbar[0] * kbar[1]);
  const int64_t wanted = std::min<int64_t>(64, ceil_div(264, heads));
  return std::max<int64_t>(1, std::min(wanted, ceil_div(q[2], 16)));
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <>
int64_t Kernels<Device::cuda>::dash_route_backward_scratch(const Shape& q, const Shape& kbar) {
  return std::max(kbar.numel() * backward_parts(q, kbar), hopper_route_backward_scratch(q, kbar));
}

template <>
void Kernels<Device::cuda>::dash_route_backward(Tensor q, Tensor kbar, const DashRouting& routing,
                                                Tensor tau, const BlockSet& blocks, Tensor dbias,
                                                Tensor dq_sum, Tensor dkbar, Tensor scratch) const {
  if (dkbar.numel() == 0) return;
  check_pairs("dq", dq_sum);
  if (route_backward_hopper(q, kbar, routing, tau, blocks, dbias, dq_sum, dkbar, scratch)) return;
  const int64_t parts = backward_parts(q.shape, kbar.shape);
  if (route_backward_bf16(q, kbar, routing, tau, dbias, dq_sum, dkbar, parts, scratch)) return;
  const RouteShape s = route_shape(q, kbar, routing, 0);
  const int64_t n = s.M * s.D;
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(s.Hkv),
                  static_cast<unsigned>(s.B));
  by_type(q, [&]<class T>(T) {
    launch_tiles("route_backward", route_backward<T>, grid, s.bytes,
                 route_problem<T>(s, q, kbar, routing, 0), pointer<double>(tau),
                 pointer<float>(dbias), Rows<T>(dq_sum), pointer<double>(scratch));
  });
  const int64_t total = s.B * s.Hkv * n;
  launch_tiles("sum_parts", sum_parts, dim3(static_cast<unsigned>(ceil_div(total, threads))), 0,
               pointer<double>(scratch), parts, n, total, pointer<double>(dkbar));
}

}  // namespace entrain
