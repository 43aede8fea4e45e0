// Cross-entropy of rows of logits, and its gradient in their place.
//
// A block takes a row. It stays in shared memory, as it is, between the three passes (the largest
// logit, the sum of exponentials, the gradient), so memory sees it once to read and once to write;
// a row that does not fit is read again for each pass. Arithmetic is f32.
#include "kernels/cuda/head_loss.cuh"

namespace entrain::cuda {
namespace {

constexpr int threads = 512;

struct Best {
  float value;
  int id;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(0xffffffffu, x.value, offset),
                     __shfl_xor_sync(0xffffffffu, x.id, offset)};
    x = better(x, other);
  }
  return x;
}

template <class T, int n, bool staged>
__global__ void __launch_bounds__(threads, 3)
    cross_entropy(Pack<T, n>* logits, const int32_t* targets, float scale, float* loss,
                  int32_t* predicted, bool gradient, int width) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float sums[32];
  __shared__ Best bests[threads / 32];
  Pack<T, n>* global = logits + static_cast<int64_t>(blockIdx.x) * width;
  Pack<T, n>* row = staged ? reinterpret_cast<Pack<T, n>*>(memory) : global;

  // NaN is never the best, but makes the sum NaN.
  Best best{-INFINITY, 0};
#pragma unroll 4
  for (int p = threadIdx.x; p < width; p += threads) {
    const Pack<T, n> a = global[p];
    if (staged) row[p] = a;
    for (int e = 0; e < n; ++e) {
      if (to_float(a.at[e]) > best.value) best = {to_float(a.at[e]), p * n + e};
    }
  }
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  best = warp_best(bests[threadIdx.x % (threads / 32)]);
  const float top = best.value;

  float sum = 0;
#pragma unroll 4
  for (int p = threadIdx.x; p < width; p += threads) {
    const Pack<T, n> a = row[p];
    for (int e = 0; e < n; ++e) sum += __expf(to_float(a.at[e]) - top);
  }
  const int target = targets[blockIdx.x];
  const float at_target = to_float(reinterpret_cast<const T*>(row)[target]) - top;
  sum = block_sum(sum, sums);  // from here on no thread reads another's logits
  if (threadIdx.x == 0) {
    loss[blockIdx.x] = logf(sum) - at_target;
    if (predicted) predicted[blockIdx.x] = best.id;
  }
  if (!gradient) return;

  const float factor = scale / sum;
#pragma unroll 4
  for (int p = threadIdx.x; p < width; p += threads) {
    Pack<T, n> a = row[p];
    for (int e = 0; e < n; ++e) {
      const float probability = __expf(to_float(a.at[e]) - top) * factor;
      a.at[e] = from_float<T>(p * n + e == target ? probability - scale : probability);
    }
    global[p] = a;
  }
}

/// Shared memory that a block may ask for, besides the little that it always has.
size_t most_shared() {
  static const size_t bytes = [] {
    int device = 0, most = 0;
    check(cudaGetDevice(&device), "the GPU in use");
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "the GPU's shared memory");
    return static_cast<size_t>(most) - 1024;
  }();
  return bytes;
}

}  // namespace

void softmax_cross_entropy(Tensor logits, Tensor targets, double scale, Tensor loss,
                           Tensor predicted, bool gradient) {
  const int64_t rows = logits[0], V = logits[1];
  if (rows == 0) return;
  const size_t bytes = static_cast<size_t>(V) * size_of(logits.dtype);
  by_type(logits, [&]<class T>(T) {
    const auto launch = [&]<int n, bool staged>(std::integral_constant<int, n>,
                                                std::bool_constant<staged>) {
      auto* kernel = cross_entropy<T, n, staged>;
      if (staged) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)),
              "the shared memory of a row of logits");
      }
      kernel<<<static_cast<unsigned>(rows), threads, staged ? bytes : 0, stream()>>>(
          reinterpret_cast<Pack<T, n>*>(pointer<T>(logits)), pointer<int32_t>(targets),
          static_cast<float>(scale), pointer<float>(loss), pointer<int32_t>(predicted), gradient,
          static_cast<int>(V / n));
    };
    constexpr int wide = 16 / sizeof(T);
    const bool packed = V % wide == 0 && reinterpret_cast<uintptr_t>(logits.data) % 16 == 0;
    const auto by_place = [&](auto staged) {
      packed ? launch(std::integral_constant<int, wide>{}, staged)
             : launch(std::integral_constant<int, 1>{}, staged);
    };
    bytes <= most_shared() ? by_place(std::true_type{}) : by_place(std::false_type{});
  });
  check_launch("softmax_cross_entropy");
}

}  // namespace entrain::cuda
