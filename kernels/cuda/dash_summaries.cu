// DashAttention's chunk summaries (arXiv 2605.18753, stage 0) and their way back, in double. A
// block takes a chunk, a warp a token: the chunk's keys, read from memory once, come from the
// first-level cache again. bf16 keys go to dash_summaries_bf16.cu where it takes them.
#include <cmath>

#include "kernels/cuda/dash_summaries.cuh"
#include "kernels/cuda/entmax_row.cuh"
#include "kernels/cuda/score_tile.cuh"

namespace entrain {
namespace cuda {
namespace {

constexpr int threads = tile_threads, warps = threads / 32;
constexpr int lane_dims = 8;  // of a row of up to 256 in each lane

/// Calls f(index among the lane's, dimension) for a lane's dimensions of a row.
template <class F>
__device__ __forceinline__ void for_lane_dims(int D, F f) {
#pragma unroll
  for (int x = 0; x < lane_dims; ++x) {
    const int d = static_cast<int>(threadIdx.x % 32) + 32 * x;
    if (d < D) f(x, d);
  }
}

/// a [chunk] = softmax_t(s . k_t / sqrt(D)) over a chunk's tokens, or without s all the same. a is
/// shared, and complete for all threads on return.
template <class T>
__device__ void summary_weights(const T* k, int64_t step, const float* s, int chunk, int D,
                                double* a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!s) {
    for (int t = threadIdx.x; t < chunk; t += threads) a[t] = 1 / static_cast<double>(chunk);
    __syncthreads();
    return;
  }
  const double scale = 1 / sqrt(static_cast<double>(D));
  for (int t = warp; t < chunk; t += warps) {
    double dot = 0;
    for_lane_dims(
        D, [&](int, int d) { dot += static_cast<double>(s[d]) * to_float(k[t * step + d]); });
    dot = warp_sum(dot);
    if (lane == 0) a[t] = dot * scale;
  }
  __syncthreads();
  const Lanes all(32);  // every warp goes over the whole chunk
  double top = -INFINITY, sum = 0;
  for (int t = lane; t < chunk; t += 32) top = fmax(top, a[t]);
  top = all.max(top);
  for (int t = lane; t < chunk; t += 32) sum += exp(a[t] - top);
  sum = all.sum(sum);
  __syncthreads();
  for (int t = threadIdx.x; t < chunk; t += threads) a[t] = exp(a[t] - top) / sum;
  __syncthreads();
}

/// out[d] = sum of the warps' x in order. shared: [warps, D]; may be used again after a barrier.
template <class F>
__device__ void sum_of_warps(const double (&x)[lane_dims], int D, double* shared, F out) {
  for_lane_dims(D, [&](int i, int d) { shared[threadIdx.x / 32 * D + d] = x[i]; });
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += threads) {
    double sum = shared[d];
    for (int warp = 1; warp < warps; ++warp) sum += shared[warp * D + d];
    out(d, sum);
  }
}

/// Shared: a [chunk], then the warps' sums.
template <class T, class K>
__global__ void __launch_bounds__(threads)
    summarize(Rows<T> k, const float* s, int chunk, Rows<K> kbar, int64_t H, int64_t N, int D,
              int64_t M) {
  extern __shared__ __align__(16) double shared[];
  const int64_t c = blockIdx.x % M, r = blockIdx.x / M % H, b = blockIdx.x / M / H;
  K* out = kbar.at(b, r, c);
  if ((c + 1) * chunk > N) {  // a trailing partial chunk has no summary
    for (int d = threadIdx.x; d < D; d += threads) out[d] = 0;
    return;
  }
  const T* keys = k.at(b, r, c * chunk);
  summary_weights(keys, k.token_step, s ? s + r * D : nullptr, chunk, D, shared);
  double sums[lane_dims] = {};
  for (int t = threadIdx.x / 32; t < chunk; t += warps) {
    const double a = shared[t];
    for_lane_dims(D, [&](int x, int d) { sums[x] += a * to_float(keys[t * k.token_step + d]); });
  }
  sum_of_warps(sums, D, shared + chunk, [&](int d, double sum) { out[d] = static_cast<K>(sum); });
}

/// Grid (parts, Hkv): a block takes every parts-th chunk of one kv head and the batch. With
/// e_t = dkbar . k_t: dk_t += a_t dkbar + a_t (e_t - mean) s / sqrt(D), ds += sum_t a_t (e_t -
/// mean) k_t / sqrt(D), mean = sum_u a_u e_u. ds stays in registers until all chunks are done.
/// Shared: a [chunk], e [chunk], the warps' sums.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    summarize_backward(Rows<T> k, const float* s, int chunk, const double* dkbar, Rows<T> dk,
                       int64_t B, int64_t H, int64_t N, int D, int64_t M) {
  extern __shared__ __align__(16) double shared[];
  double *a = shared, *e = a + chunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t r = blockIdx.y, complete = N / chunk;
  const float* query = s ? s + r * D : nullptr;
  const double scale = 1 / sqrt(static_cast<double>(D));
  double ds[lane_dims] = {};
  for (int64_t x = blockIdx.x; x < B * complete; x += gridDim.x) {
    const int64_t b = x / complete, c = x % complete;
    const T* keys = k.at(b, r, c * chunk);
    T* dkeys = dk.at(b, r, c * chunk);
    const double* dout = dkbar + ((b * H + r) * M + c) * D;
    summary_weights(keys, k.token_step, query, chunk, D, a);
    for (int t = warp; t < chunk; t += warps) {
      double dot = 0;
      for_lane_dims(D, [&](int, int d) { dot += dout[d] * to_float(keys[t * k.token_step + d]); });
      dot = warp_sum(dot);
      if (lane == 0) e[t] = dot;
    }
    __syncthreads();
    double mean = 0;
    for (int t = lane; t < chunk; t += 32) mean += a[t] * e[t];
    mean = warp_sum(mean);
    for (int t = warp; t < chunk; t += warps) {
      const double weight = a[t], dscore = weight * (e[t] - mean) * scale;
      for_lane_dims(D, [&](int i, int d) {
        double dkey = weight * dout[d];
        if (query) {
          dkey += dscore * query[d];
          ds[i] += dscore * to_float(keys[t * k.token_step + d]);
        }
        T& to = dkeys[t * dk.token_step + d];
        to = from_float<T>(static_cast<float>(to_float(to) + dkey));
      });
    }
    __syncthreads();  // a and e are the next chunk's
  }
  if (!query) return;
  sum_of_warps(ds, D, shared + 2 * chunk,
               [&](int d, double sum) { ds_parts[(blockIdx.x * H + r) * D + d] = sum; });
}

void check_summaries(const Tensor& k, const Tensor& s, const Tensor& kbar) {
  const bool fit = k.shape.rank == 4 && kbar.shape.rank == 4 && k[0] == kbar[0] &&
                   k[1] == kbar[1] && k[3] == kbar[3] && k[3] <= 32 * lane_dims &&
                   (!s || s.numel() == k[1] * k[3]);
  if (!fit) {
    fail("summaries " + kbar.shape.to_string() + " of keys " + k.shape.to_string() + " by " +
         s.shape.to_string());
  }
}

/// Bytes of shared memory for `rows` numbers a token and the sums of the warps.
int64_t summary_bytes(int64_t chunk, int64_t rows, int64_t D) {
  const int64_t bytes = 8 * (rows * chunk + warps * D);
  if (bytes > SharedMemory::of_device().most) {
    fail("a chunk of " + std::to_string(chunk) + " tokens is too long for the GPU");
  }
  return bytes;
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <>
void Kernels<Device::cuda>::dash_summaries(Tensor k, Tensor s, int64_t chunk, Tensor kbar) const {
  check_summaries(k, s, kbar);
  const int64_t B = k[0], H = k[1], N = k[2], D = k[3], M = kbar[2];
  if (B * H * M == 0 || summarize_bf16(k, s, chunk, kbar)) return;
  const int64_t bytes = summary_bytes(std::min(chunk, N), 1, D);
  by_type(k, [&]<class T>(T) {
    by_summary_type(kbar, [&]<class K>(K) {
      launch_tiles("summarize", summarize<T, K>, dim3(static_cast<unsigned>(B * H * M)), bytes,
                   Rows<T>(k), pointer<float>(s), static_cast<int>(chunk), Rows<K>(kbar), H, N,
                   static_cast<int>(D), M);
    });
  });
}

template <>
void Kernels<Device::cuda>::dash_summaries_backward(Tensor k, Tensor s, int64_t chunk, Tensor dkbar,
                                                    Tensor dk_sum, Tensor ds_sum) const {
  check_summaries(k, s, dkbar);
  const int64_t B = k[0], H = k[1], N = k[2], D = k[3], M = dkbar[2], chunks = B * (N / chunk);
  if (chunks * H == 0) return;
  if (H * D > ds_capacity) {
    fail("summaries of more than " + std::to_string(ds_capacity / D) + " heads on the GPU");
  }
  if (summarize_backward_bf16(k, s, chunk, dkbar, dk_sum, ds_sum)) return;
  const int64_t parts = ds_parts_of(chunks, 528, H, D);
  const int64_t bytes = summary_bytes(chunk, 2, D);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(H));
  by_type(k, [&]<class T>(T) {
    launch_tiles("summarize_backward", summarize_backward<T>, grid, bytes, Rows<T>(k),
                 pointer<float>(s), static_cast<int>(chunk), pointer<double>(dkbar),
                 Rows<T>(dk_sum), B, H, N, static_cast<int>(D), M);
  });
  if (s) add_ds_parts(parts, H * D, pointer<float>(ds_sum));
}

}  // namespace entrain
