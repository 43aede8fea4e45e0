#pragma once
// Chunk summaries of bf16 keys, and what their backward pass shares with that in double: sums of ds
// that blocks leave to be added up in order.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

// dash_summaries_bf16.cu: keys of head_dim 64 or 128 that lie at 16 bytes, in chunks of up to 64.
/// Whether it summarized.
bool summarize_bf16(const Tensor& k, const Tensor& s, int64_t chunk, const Tensor& kbar);
/// Whether it went back.
bool summarize_backward_bf16(const Tensor& k, const Tensor& s, int64_t chunk, const Tensor& dkbar,
                             const Tensor& dk_sum, const Tensor& ds_sum);

/// Blocks that share a head's chunks, of so many in all.
constexpr int64_t ds_capacity = 1 << 17;
inline int64_t ds_parts_of(int64_t chunks, int64_t blocks, int64_t H, int64_t D) {
  return std::min({chunks, ceil_div(blocks, H), ds_capacity / (H * D)});
}

#ifdef __CUDACC__

static __device__ double ds_parts[ds_capacity];  // [parts, Hkv, D]. 1 MB.

constexpr int add_ds_warps = 8;

/// ds [n] += the parts' sums, in order. A lane takes a column, a warp every eighth part of it.
static __global__ void add_ds(int parts, int n, float* ds) {
  __shared__ double sums[add_ds_warps][32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int x = static_cast<int>(blockIdx.x) * 32 + lane;
  double sum = 0;
#pragma unroll 8
  for (int part = warp; part < parts && x < n; part += add_ds_warps) sum += ds_parts[part * n + x];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || x >= n) return;
  for (int w = 1; w < add_ds_warps; ++w) sum += sums[w][lane];
  ds[x] += static_cast<float>(sum);
}

inline void add_ds_parts(int64_t parts, int64_t n, float* ds) {
  add_ds<<<static_cast<unsigned>(ceil_div(n, 32)), 32 * add_ds_warps, 0, stream()>>>(
      static_cast<int>(parts), static_cast<int>(n), ds);
  check_launch("add_ds");
}

#endif  // __CUDACC__

}  // namespace entrain::cuda
