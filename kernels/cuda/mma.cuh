#pragma once
// A warp at the tensor cores (mma.sync m16n8k16: bf16 operands, f32 sums), and copies into shared
// memory that run beside the computation (cp.async). From sm_80 on.
//
// Fragments of a 16 x 16 operand are four registers of two bf16 each. In an accumulator of 16 x 8
// sums, lane l holds rows l / 4 (first two) and l / 4 + 8 (last two), columns 2 (l % 4) and the
// next. Two accumulators side by side are, rounded, the left operand of a next product.
#include <cstdint>

#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

using Fragment = uint32_t[4];

/// What the launch asked for.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// c += a b^T, b [8, 16] in two registers.
__device__ __forceinline__ void mma(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes.
__device__ __forceinline__ void load_matrices(Fragment& to, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(Fragment& to, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// Starts a copy of 4 or 16 bytes to shared memory; zeros instead, and no read, unless `valid`.
template <int bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes),
                 "r"(size)
                 : "memory");
  }
}
/// Waits for this thread's copies.
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
/// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits for all groups of this thread's but the last so many.
template <int groups>
__device__ __forceinline__ void wait_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/// A barrier, of 16 that a thread block has, for some of its warps. 0 is __syncthreads()'s.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// 2^x
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats rounded to bf16, the first in the lower half.
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

__device__ __forceinline__ uint64_t warp_or(uint64_t x) {
  const uint64_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(x));
  const uint64_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(x >> 32));
  return high << 32 | low;
}

/// Starts a kernel that may want more shared memory than the 48 KiB all GPUs give unasked.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared,
            const A&... arguments) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  if (shared > static_cast<size_t>(most)) {
    fail(std::string(name) + " needs " + std::to_string(shared) +
         " bytes of shared memory for this shape; a block of this GPU has " + std::to_string(most));
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        name);
  kernel<<<grid, threads, shared, stream()>>>(arguments...);
  check_launch(name);
}

}  // namespace entrain::cuda
