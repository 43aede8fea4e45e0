// y = x rstd w with rstd = rsqrt(mean(x^2) + eps), a row a token (Zhang and Sennrich 2019).
//
// A warp takes a row, its lanes packs of 16 bytes. A row is read twice, the second time from the
// caches: memory sees each tensor once, which bounds both kernels. Sums are f32.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int most_warps = 8;  // of a block

// Backward: a fixed number of blocks, whose sums of dw lie here as rows.
constexpr int64_t most_partials = 1 << 20;
__device__ __align__(32) float dw_partials[most_partials];

/// A lane's next packs of a row, all in flight at once; zeros beyond the row.
template <class T, int n, int count>
__device__ __forceinline__ void load(const Pack<T, n>* row, int p, int width,
                                     Pack<T, n> (&to)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) to[k] = p + 32 * k < width ? row[p + 32 * k] : Pack<T, n>{};
}

template <class T, int n>
__global__ void norm_rows(const Pack<T, n>* __restrict__ x, const Pack<float, n>* __restrict__ w,
                          float eps, Pack<T, n>* __restrict__ y, float* rstd, int64_t rows,
                          int width) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= rows) return;
  x += t * width;
  y += t * width;
  const int lane = threadIdx.x;
  constexpr int batch = 4;
  Pack<T, n> a[batch];
  float squares = 0;
  for (int p = lane; p < width; p += 32 * batch) {
    load(x, p, width, a);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      for (int e = 0; e < n; ++e) squares += to_float(a[k].at[e]) * to_float(a[k].at[e]);
    }
  }
  const float r = rsqrtf(warp_sum(squares) / static_cast<float>(width * n) + eps);
  for (int p = lane; p < width; p += 32 * batch) {
    load(x, p, width, a);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (p + 32 * k >= width) break;
      const Pack<float, n> scale = w[p + 32 * k];
      Pack<T, n> out;
      for (int e = 0; e < n; ++e) {
        out.at[e] = from_float<T>(to_float(a[k].at[e]) * r * scale.at[e]);
      }
      y[p + 32 * k] = out;
    }
  }
  if (lane == 0) rstd[t] = r;
}

// With n = x rstd: dx += rstd (w dy - n mean(w dy n)), dw = sum_t dy n. A lane owns the same
// columns of all rows of its warp and sums their dw in shared memory, [warp][d].
template <class T, int n>
__global__ void __launch_bounds__(32 * most_warps, 4)
    norm_rows_backward(const Pack<T, n>* __restrict__ dy, const Pack<T, n>* __restrict__ x,
                       const Pack<float, n>* __restrict__ w, const float* rstd,
                       Pack<T, n>* __restrict__ dx, int64_t rows, int width) {
  constexpr int batch = 2;
  extern __shared__ __align__(32) float dw[];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, d = width * n;
  auto* own = reinterpret_cast<Pack<float, n>*>(dw) + warp * width;
  for (int p = lane; p < width; p += 32) own[p] = {};

  const int64_t step = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + warp; t < rows; t += step) {
    const Pack<T, n>* dyt = dy + t * width;
    const Pack<T, n>* xt = x + t * width;
    Pack<T, n>* dxt = dx + t * width;
    const float r = rstd[t];
    Pack<T, n> a[batch], b[batch], sum[batch];
    float dot = 0;
    for (int p = lane; p < width; p += 32 * batch) {
      load(dyt, p, width, a);
      load(xt, p, width, b);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (p + 32 * k >= width) break;
        const Pack<float, n> scale = w[p + 32 * k];
        for (int e = 0; e < n; ++e) {
          dot += scale.at[e] * to_float(a[k].at[e]) * to_float(b[k].at[e]);
        }
      }
    }
    const float c = warp_sum(dot) * r * r / static_cast<float>(d);
    for (int p = lane; p < width; p += 32 * batch) {
      load(dxt, p, width, sum);
      load(dyt, p, width, a);
      load(xt, p, width, b);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int at = p + 32 * k;
        if (at >= width) break;
        const Pack<float, n> scale = w[at];
        Pack<float, n> dw_sum = own[at];
        for (int e = 0; e < n; ++e) {
          const float dout = to_float(a[k].at[e]), in = to_float(b[k].at[e]);
          dw_sum.at[e] += dout * (in * r);
          const float dx_e = r * (scale.at[e] * dout - in * c);
          sum[k].at[e] = from_float<T>(to_float(sum[k].at[e]) + dx_e);
        }
        own[at] = dw_sum;
        dxt[at] = sum[k];
      }
    }
  }

  __syncthreads();
  for (int j = warp * 32 + lane; j < d; j += warps * 32) {
    float sum = 0;
    for (int i = 0; i < warps; ++i) sum += dw[i * d + j];
    dw_partials[static_cast<int64_t>(blockIdx.x) * d + j] = sum;
  }
}

}  // namespace

template <>
void Kernels<Device::cuda>::rmsnorm(Tensor x, Tensor w, double eps, Tensor y, Tensor rstd) const {
  if (x.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    by_pack<T>({x, w, y}, [&]<int n>(std::integral_constant<int, n>) {
      const auto blocks = static_cast<unsigned>(ceil_div(x[0], most_warps));
      norm_rows<T, n><<<blocks, dim3(32, most_warps), 0, stream()>>>(
          packs<T, n>(x), packs<float, n>(w), static_cast<float>(eps), packs<T, n>(y),
          pointer<float>(rstd), x[0], static_cast<int>(x[1] / n));
    });
  });
  check_launch("rmsnorm");
}

template <>
void Kernels<Device::cuda>::rmsnorm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd,
                                             Tensor dx_sum, Tensor dw_sum) const {
  if (x.numel() == 0) return;
  // Blocks that an H100's multiprocessors hold at once, by their shared memory. The partition
  // depends on the shape alone, so results do not depend on the GPU.
  const int64_t rows = x[0], d = x[1];
  const int64_t warps = std::clamp<int64_t>((96 << 10) / (d * 4), 1, most_warps);
  const int64_t blocks =
      std::min({d <= 1024 ? int64_t{528} : int64_t{264}, most_partials / d, ceil_div(rows, warps)});
  const auto shared = static_cast<size_t>(warps * d) * sizeof(float);
  by_type(x, [&]<class T>(T) {
    by_pack<T>({dy, x, w, dx_sum}, [&]<int n>(std::integral_constant<int, n>) {
      auto* kernel = norm_rows_backward<T, n>;
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)),
            "the shared memory of rmsnorm's gradient");
      kernel<<<static_cast<unsigned>(blocks), dim3(32, static_cast<unsigned>(warps)), shared,
               stream()>>>(packs<T, n>(dy), packs<T, n>(x), packs<float, n>(w),
                           pointer<float>(rstd), packs<T, n>(dx_sum), rows,
                           static_cast<int>(d / n));
    });
  });
  check_launch("rmsnorm_backward");
  void* partials = nullptr;
  check(cudaGetSymbolAddress(&partials, dw_partials), "rmsnorm's partial sums");
  add_rows(Tensor::of(partials, {blocks, d}, DType::f32, Device::cuda), dw_sum);
}

}  // namespace entrain
