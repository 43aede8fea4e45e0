#pragma once
// What the CUDA kernels share: the stream, checks of errors, element types, sums over a warp.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "kernels/kernels.h"

namespace entrain {

template <>
constexpr DType dtype_of<__nv_bfloat16>() {
  return DType::bf16;
}

namespace cuda {

using bf16 = __nv_bfloat16;

/// The stream of this process: all its work, in order.
cudaStream_t stream();
/// Multiprocessors of its GPU.
int multiprocessors();

/// Copies doubles (8 at most) of the host, pinned where a graph is to read them anew each time, to
/// where kernels read them until the next call.
const double* on_device(const double* host, int count);
/// Where kernels read them in place if they are pinned, which takes a trip to the host but no copy
/// to wait for; otherwise as above.
const double* in_place(const double* host, int count);

/// Throws Error. nvcc cannot read fmt's header, so messages are put together by hand.
[[noreturn]] void fail(const std::string& message);
/// Throws Error naming what failed.
void check(cudaError_t status, const char* what);
inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

[[noreturn]] void fail_outside(const Tensor& t);  // it is not in device memory

/// Device memory of a tensor, null where it is empty.
template <class T>
T* pointer(const Tensor& t) {
  if (!t) return nullptr;
  if (t.device != Device::cuda) fail_outside(t);
  return t.ptr<T>();
}

/// Calls f with a value of t's element type: training runs bf16, tests float too.
template <class F>
void by_type(const Tensor& t, F f) {
  if (t.dtype == DType::bf16) {
    f(bf16{});
  } else {
    f(float{});  // others fail where they are read
  }
}

/// Likewise with that of summaries: f64, or f32 as caches of bf16 models have them.
template <class F>
void by_summary_type(const Tensor& t, F f) {
  if (t.dtype == DType::f32) {
    f(float{});
  } else {
    f(double{});
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// n consecutive elements, aligned to their size, so that they are read and written 16 bytes at a
/// time.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

/// A tensor's memory as packs.
template <class T, int n>
Pack<T, n>* packs(const Tensor& t) {
  return reinterpret_cast<Pack<T, n>*>(pointer<T>(t));
}

/// Calls f with the width n of packs that rows of all these tensors consist of: 16 bytes of T, or
/// single elements where one of them is not aligned.
template <class T, class F>
void by_pack(std::initializer_list<Tensor> tensors, F f) {
  constexpr int wide = 16 / sizeof(T);
  bool whole = true;
  for (const Tensor& t : tensors) {
    const int last = t.shape.rank - 1;
    const size_t bytes = wide * size_of(t.dtype);
    whole = whole && reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && t[last] % wide == 0;
    for (int d = 0; d < last; ++d) whole = whole && t.stride[d] % wide == 0;
  }
  whole ? f(std::integral_constant<int, wide>{}) : f(std::integral_constant<int, 1>{});
}

#ifdef __CUDACC__  // what follows runs on the device only

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);  // bf16: to nearest, NaN stays NaN
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

/// Over a block of up to 32 whole warps, in a fixed order; every thread gets the sum. `shared`
/// holds 32 values and may be used again after the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = warp_sum(x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  const int warps = (blockDim.x + 31) / 32;
  return warp_sum(lane < warps ? shared[lane] : T{0});
}

#endif  // __CUDACC__

/// A [B, H, N, D] view as kernels take it: rows whose last stride is 1.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch_step = 0, head_step = 0, token_step = 0;

  __host__ explicit Rows(const Tensor& t)
      : data(pointer<T>(t)),
        batch_step(t.stride[0]),
        head_step(t.stride[1]),
        token_step(t.stride[2]) {}
  __host__ __device__ T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch_step + h * head_step + i * token_step;
  }
};

}  // namespace cuda
}  // namespace entrain
