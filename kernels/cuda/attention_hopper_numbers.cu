// What the two halves of a backward pass on Hopper need of each query besides its rows: the log of
// its sum of weights, in base 2, and delta = sum of o dout. Dense attention reads them by rows of a
// head, block-sparse attention by queries with all heads of a group.
//
// D / 8 neighbouring lanes take a row, 16 bytes of o and dout each. Floor: 4 D bytes a row, B 16,
// Hq 8, D 64, N 4096: 0.13 GB, 0.05 ms.
#include "kernels/cuda/attention_hopper.cuh"

namespace entrain::cuda {
namespace {

/// By D / 8 neighbouring lanes: the sum of o dout of a row.
template <int D>
__device__ __forceinline__ float delta_of(const Rows<bf16>& o, const Rows<bf16>& dout, int64_t b,
                                          int64_t head, int64_t i, bool has) {
  constexpr int lanes = D / 8;
  const int d = static_cast<int>(threadIdx.x) % lanes * 8;
  float sum = 0;
  if (has) {
    const auto x = *reinterpret_cast<const Pack<bf16, 8>*>(o.at(b, head, i) + d);
    const auto y = *reinterpret_cast<const Pack<bf16, 8>*>(dout.at(b, head, i) + d);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += to_float(x.at[e]) * to_float(y.at[e]);
  }
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  return sum;
}

template <int D>
__global__ void __launch_bounds__(256)
    numbers_kernel(const Rows<bf16> o, const Rows<bf16> dout, const float* lse, float* log_sums,
                   float* deltas, int Hq, int N, int padded, int64_t rows) {
  constexpr int lanes = D / 8;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / lanes;
  if (row >= rows) return;  // whole warps: a block's rows are a multiple of a warp's, as are all
  const auto i = static_cast<int>(row % padded);
  const int64_t head = row / padded;
  const float delta = delta_of<D>(o, dout, head / Hq, head % Hq, i, i < N);
  if (threadIdx.x % lanes != 0) return;
  deltas[row] = delta;
  log_sums[row] = i < N ? lse[head * N + i] * log2_e : INFINITY;
}

template <int D>
__global__ void __launch_bounds__(256)
    pairs_kernel(const Rows<bf16> o, const Rows<bf16> dout, const float* lse, float2* pairs,
                 int Hkv, uint32_t g, int64_t N, int64_t rows) {
  constexpr int lanes = D / 8;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / lanes;
  const bool has = row < rows;
  const int64_t kv_head = row / (N * g);
  const auto rest = static_cast<uint32_t>(row - kv_head * N * g);
  const int64_t i = rest / g, head = kv_head % Hkv * g + rest % g, b = kv_head / Hkv;
  const float delta = delta_of<D>(o, dout, b, head, i, has);
  if (has && threadIdx.x % lanes == 0) {
    pairs[row] = {lse[(b * Hkv * g + head) * N + i] * log2_e, delta};
  }
}

}  // namespace

int64_t query_numbers_scratch(const AttentionProblem& p) {
  return 2 * p.B * p.Hq * padded_rows(p) * int64_t{sizeof(float)};
}

QueryNumbers query_numbers(const AttentionProblem& p, const Rows<bf16>& o, const Rows<bf16>& dout,
                           const float* lse, float* scratch) {
  const int64_t rows = p.B * p.Hq * padded_rows(p);
  float *log_sums = scratch, *deltas = scratch + rows;
  by_dense_head_dim(p.D, [&](auto D) {
    launch("attention_backward: delta", numbers_kernel<D>, ceil_div(rows * (D / 8), 256), 256, 0, o,
           dout, lse, log_sums, deltas, static_cast<int>(p.Hq), static_cast<int>(p.N),
           static_cast<int>(padded_rows(p)), rows);
  });
  return {log_sums, deltas};
}

const float2* query_pairs(const AttentionProblem& p, const Rows<bf16>& o, const Rows<bf16>& dout,
                          const float* lse, float* scratch) {
  const int64_t rows = p.B * p.Hq * p.N;
  auto* pairs = reinterpret_cast<float2*>(scratch);
  by_dense_head_dim(p.D, [&](auto D) {
    launch("attention_backward: delta", pairs_kernel<D>, ceil_div(rows * (D / 8), 256), 256, 0, o,
           dout, lse, pairs, static_cast<int>(p.Hkv), static_cast<uint32_t>(p.g), p.N, rows);
  });
  return pairs;
}

}  // namespace entrain::cuda
