// The way back through DashAttention's router for bf16 queries. A block goes over many tiles of one
// kv head, of which it computes the scores anew:
//
//   z, tau -> w (a warp a query) -> dw = (D - mean D) / (sigma (w + eps) g), in w's place
//   dw, z -> dz (eight lanes a row), bf16 in z's place
//   dq += scale dz kbar, dkbar += scale dz^T q: tensor cores, over the groups of 16 columns in
//   which any row of the tile has a gradient
//
// Gradients are rounded to bf16, as those of attention are; sums are f32 in a block and f64 over
// blocks, and always in the same order.
//
// Predicted as in dash_bf16.cu, where double took 2.8 ms: scores 55 us, w and dz 50, D up to 45
// (only where w > 0), dq and dkbar 25, reading and writing sums and dq 70, adding up parts 10: 0.2
// to 0.3.
// Measured as there: 2.7 ms.
#include "kernels/cuda/dash_bf16.cuh"

namespace entrain::cuda {
namespace {

constexpr int row_tiles = 4;  // more do not fit twice beside w, nor their sums in registers

/// From D to dw, which takes the place of w; up to a multiple of 32 columns, 0 off the support. D
/// is 0 off the support, where it is not read.
template <class Entmax>
__device__ void weights_backward(const Bf16RouteTile& tile, const Entmax& entmax,
                                 const float* dbias) {
  const Bf16RouteShape& s = tile.p.shape;
  const DashRouting& routing = tile.p.routing;
  const auto sigma_g = static_cast<float>(routing.sigma * s.g);
  const auto eps = static_cast<float>(routing.prior_eps);
  for (int i = tile.warp(); i < tile.count; i += bf16_warps) {
    const float* sums = dbias + tile.at_query(i) * s.M + routing.init_blocks;
    float* w = tile.w + i * s.z_step;
    const int n = tile.n[i * s.g], end = (n + 31) / 32 * 32;
    float mean = 0;
    int support = 0;
    for (int c = tile.lane(); c < end; c += 32) {
      const float weight = c < n ? tile.weight(entmax, i, c) : 0;
      const bool routed = weight > least_weight;
      w[c] = routed ? weight : 0;
      mean += routed ? sums[c] : 0;
      support += __popc(__ballot_sync(0xffffffffu, routed));
    }
    mean = warp_sum(mean);
    mean = routing.center && support > 0 ? mean / static_cast<float>(support) : 0;
    for (int c = tile.lane(); c < end; c += 32) {
      if (w[c] > 0) w[c] = (sums[c] - mean) / (sigma_g * (w[c] + eps));
    }
  }
}

/// From dw to the gradients of the scores, which take their place as bf16: 0 where a row has no
/// such candidate, up to a multiple of 32 columns. What a step writes, all lanes have read by then.
template <class Entmax>
__device__ void scores_backward(const Bf16RouteTile& tile, const Entmax& entmax) {
  const Bf16RouteShape& s = tile.p.shape;
  const Lanes lanes(row_lanes);
  tile.for_rows([&](int row) {
    const int n = tile.n[row];
    const float tau = tile.tau[row];
    float* scores = tile.scores(row);
    float* dw = tile.w + (n > 0 ? row / s.g : 0) * s.z_step;
    auto weigh = [&](const float4& a) {
      return make_float4(entmax.weight(a.x, tau), entmax.weight(a.y, tau), entmax.weight(a.z, tau),
                         entmax.weight(a.w, tau));
    };
    float total = 0, weighted = 0;
    for_fours(scores, n, [&](const float4& a, int c) {
      const float4 p = weigh(a), d = *reinterpret_cast<const float4*>(dw + c);
      total += p.x + p.y + (p.z + p.w);
      weighted += p.x * d.x + p.y * d.y + (p.z * d.z + p.w * d.w);
    });
    total = lanes.sum(total);
    weighted = lanes.sum(weighted);
    const float centre = total > 0 ? weighted / total : 0;
    unsigned live = 0;
    for (int c = 4 * lanes.rank; c < (tile.width + 31) / 32 * 32; c += 32) {
      uint2 dz = {0, 0};
      if (c < n) {
        const float4 p = weigh(*reinterpret_cast<const float4*>(scores + c));
        const float4 d = *reinterpret_cast<const float4*>(dw + c);
        dz.x = pack(p.x * (d.x - centre), p.y * (d.y - centre));
        dz.y = pack(p.z * (d.z - centre), p.w * (d.w - centre));
        if (((dz.x | dz.y) & 0x7fff7fffu) != 0) live |= 1u << (c / 16);
      }
      __syncwarp();
      *reinterpret_cast<uint2*>(reinterpret_cast<bf16*>(scores) + c) = dz;
      __syncwarp();
    }
    live = __reduce_or_sync(0xffffffffu, live);
    if (tile.lane() == 0 && live != 0) atomicOr(tile.live, live);
  });
}

/// The first column of the lowest live group, which it removes.
__device__ __forceinline__ int take_group(unsigned& live) {
  const int group = __ffs(static_cast<int>(live)) - 1;
  live &= live - 1;
  return 16 * group;
}

/// dq += scale dz kbar: a warp takes 16 dimensions and up to 32 rows.
__device__ void add_dq(const Bf16RouteTile& tile, const Rows<bf16>& dq) {
  const Bf16RouteShape& s = tile.p.shape;
  const int x = tile.lane() / 4, t = tile.lane() % 4, pairs = (s.rows + 31) / 32;
  const int step = 2 * s.z_step;  // of dz, in bf16
  const double* kbar = tile.kbar();
  for (int item = tile.warp(); item < pairs * ((s.D + 15) / 16); item += bf16_warps) {
    const int row0 = item % pairs * 32, d0 = item / pairs * 16;
    const bool second = row0 + 16 < s.rows;
    const uint32_t a_at = shared_address(reinterpret_cast<bf16*>(tile.z) +
                                         (row0 + tile.lane() % 16) * step + tile.lane() / 16 * 8);
    auto load_kbar = [&](float(&to)[2][4], int c0) {  // columns c0 + 2t, + 1, + 8, + 9
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = c0 + 2 * t + j % 2 + j / 2 % 2 * 8, d = d0 + j / 4 * 8 + x;
        const bool within = c < tile.width && d < s.D;
        to[j / 4][j % 4] = within ? static_cast<float>(kbar[c * tile.p.kbar.token_step + d]) : 0;
      }
    };
    float sum[2][2][4] = {}, next[2][4];
    unsigned live = *tile.live;
    int c0 = live ? take_group(live) : -1;
    if (c0 >= 0) load_kbar(next, c0);
#pragma unroll 1
    while (c0 >= 0) {
      uint32_t keys[2][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        keys[j / 2][j % 2] = pack(next[j / 2][j % 2 * 2], next[j / 2][j % 2 * 2 + 1]);
      }
      const int c = c0;
      c0 = live ? take_group(live) : -1;
      if (c0 >= 0) load_kbar(next, c0);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (m == 1 && !second) break;
        Fragment a;
        load_matrices(a, a_at + 2 * (16 * m * step + c));
        mma(sum[m][0], a, keys[0][0], keys[0][1]);
        mma(sum[m][1], a, keys[1][0], keys[1][1]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // 8 (j / 2): rows; 8 (j % 2): dimensions
      const int row = row0 + j / 2 * 8 + x, d = d0 + j % 2 * 8 + 2 * t;
      if (row >= tile.count * s.g || d >= s.D || tile.n[row] == 0) continue;
      const float* pair = sum[j / 4][j % 2] + j / 2 % 2 * 2;
      auto* at = reinterpret_cast<uint32_t*>(
          dq.at(tile.b, tile.r * s.g + row % s.g, tile.first + row / s.g) + d);
      const uint32_t old = *at;
      *at = pack(__uint_as_float(old << 16) + tile.scale * pair[0],
                 __uint_as_float(old & 0xffff0000u) + tile.scale * pair[1]);
    }
  }
}

/// sums [columns, D] += dz^T q in 16 columns from c0 on and 32 dimensions from d0 on, by a warp.
__device__ void add_dkbar_part(const Bf16RouteTile& tile, int c0, int d0, float* sums) {
  const Bf16RouteShape& s = tile.p.shape;
  const int lane = tile.lane(), x = lane / 4, t = lane % 4, step = 2 * s.z_step;
  const bool whole = d0 + 16 < s.D;  // there is a second half of 16 dimensions
  auto at = [&](int i) -> float2* {  // 8 (i / 4): columns; 8 (i % 4): dimensions
    const int c = c0 + i / 4 * 8 + x, d = d0 + i % 4 * 8 + 2 * t;
    return c < tile.width && d < s.D ? reinterpret_cast<float2*>(sums + c * s.D + d) : nullptr;
  };
  float sum[4][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2* from = at(i);
    const float2 old = from ? *from : make_float2(0, 0);
    sum[i % 4][i / 4 * 2] = old.x;
    sum[i % 4][i / 4 * 2 + 1] = old.y;
  }
  const uint32_t a_at = shared_address(reinterpret_cast<bf16*>(tile.z) +
                                       (lane % 8 + lane / 16 * 8) * step + c0 + lane / 8 % 2 * 8);
  const uint32_t b_at = shared_address(tile.q + lane % 16 * s.q_step + d0 + lane / 16 * 8);
#pragma unroll 1
  for (int row = 0; row < s.rows; row += 16) {
    Fragment a, b;
    load_matrices_transposed(a, a_at + 2 * row * step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !whole) break;
      load_matrices_transposed(b, b_at + 2 * (row * s.q_step + 16 * half));
      mma(sum[2 * half], a, b[0], b[1]);
      mma(sum[2 * half + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2* to = at(i);
    if (to) *to = make_float2(sum[i % 4][i / 4 * 2], sum[i % 4][i / 4 * 2 + 1]);
  }
}

/// sums [M, D] += dz^T q over the live groups. No other block adds to these sums.
__device__ void add_dkbar(const Bf16RouteTile& tile, float* sums) {
  const int D = tile.p.shape.D;
  sums += tile.p.routing.init_blocks * D;
  int item = 0;
  for (unsigned live = *tile.live; live != 0;) {
    const int c0 = take_group(live);
    for (int d0 = 0; d0 < D; d0 += 32, ++item) {
      if (item % bf16_warps == tile.warp()) add_dkbar_part(tile, c0, d0, sums);
    }
  }
}

/// Grid (parts, Hkv, B): a block goes over every parts-th tile of one kv head and sums its dkbar in
/// its own [M, D] of sums.
__global__ void __launch_bounds__(bf16_threads, 2)
    route_backward(const Bf16RouteProblem p, const double* tau, const float* dbias, Rows<bf16> dq,
                   float* sums) {
  const Bf16RouteShape& s = p.shape;
  const int64_t b = blockIdx.z, r = blockIdx.y, per_head = s.M * s.D;
  sums += ((b * s.Hkv + r) * gridDim.x + blockIdx.x) * per_head;
  for (int64_t x = threadIdx.x; x < per_head; x += bf16_threads) sums[x] = 0;
  Bf16RouteTile tile(p, dynamic_shared());
  for (int64_t t = blockIdx.x; t < s.tiles(); t += gridDim.x) {
    __syncthreads();  // the last tile is done with
    tile.load<row_tiles>(b, r, t);
    if (tile.width == 0) continue;
    tile.for_thresholds(
        [&](int h, int i, int row) { tile.tau[row] = static_cast<float>(tau[tile.at_row(i, h)]); });
    __syncthreads();
    by_curve(tile.alpha, [&](const auto& entmax) {
      weights_backward(tile, entmax, dbias);
      __syncthreads();
      scores_backward(tile, entmax);
    });
    __syncthreads();
    add_dq(tile, dq);
    add_dkbar(tile, sums);
  }
}

/// dkbar [heads, n] = gamma / sqrt(D) times the parts' sums [heads, parts, n], in order.
__global__ void sum_parts(const float* sums, int64_t parts, int64_t n, int64_t total,
                          const double* alpha_gamma, double root, double* dkbar) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= total) return;
  const float* part = sums + x / n * parts * n + x % n;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < parts; ++i) sum += part[i * n];
  dkbar[x] = alpha_gamma[1] / root * sum;
}

}  // namespace

bool route_backward_bf16(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                         const Tensor& tau, const Tensor& dbias, const Tensor& dq_sum,
                         const Tensor& dkbar, int64_t parts, const Tensor& scratch) {
  const Bf16RouteShape s = bf16_route_shape(q, kbar, routing, 0, row_tiles, true);
  if (s.bytes == 0) return false;
  const Bf16RouteProblem problem = bf16_route_problem(s, q, kbar, routing, 0);
  auto* sums = reinterpret_cast<float*>(pointer<double>(scratch));
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(s.Hkv),
                  static_cast<unsigned>(s.B));
  const auto bytes = static_cast<int>(s.bytes);
  check(cudaFuncSetAttribute(route_backward, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "route_backward");
  route_backward<<<grid, bf16_threads, static_cast<size_t>(bytes), stream()>>>(
      problem, pointer<double>(tau), pointer<float>(dbias), Rows<bf16>(dq_sum), sums);
  check_launch("route_backward");
  const int64_t n = s.M * s.D, total = s.B * s.Hkv * n;
  launch("sum_parts", sum_parts, ceil_div(total, 256), 256, 0, sums, parts, n, total,
         problem.alpha_gamma, std::sqrt(static_cast<double>(s.D)), pointer<double>(dkbar));
  return true;
}

}  // namespace entrain::cuda
