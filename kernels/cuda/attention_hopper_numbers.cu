// What the two halves of a backward pass on Hopper need of each query besides its rows: the log of
// its sum of weights, in base 2, and delta = sum of o dout.
//
// D / 8 neighbouring lanes take a row, 16 bytes of o and dout each. Floor: 4 D bytes a row, B 16,
// Hq 8, D 64, N 4096: 0.13 GB, 0.05 ms.
#include "kernels/cuda/attention_hopper.cuh"

namespace entrain::cuda {
namespace {

template <int D>
__global__ void __launch_bounds__(256)
    numbers_kernel(const Rows<bf16> o, const Rows<bf16> dout, const float* lse, float* log_sums,
                   float* deltas, int Hq, int N, int padded, int64_t rows) {
  constexpr int lanes = D / 8;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / lanes;
  if (row >= rows) return;  // whole warps: a block's rows are a multiple of a warp's, as are all
  const auto i = static_cast<int>(row % padded);
  const int64_t head = row / padded;
  const int d = static_cast<int>(threadIdx.x) % lanes * 8;
  float sum = 0;
  if (i < N) {
    const auto a = *reinterpret_cast<const Pack<bf16, 8>*>(o.at(head / Hq, head % Hq, i) + d);
    const auto b = *reinterpret_cast<const Pack<bf16, 8>*>(dout.at(head / Hq, head % Hq, i) + d);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += to_float(a.at[e]) * to_float(b.at[e]);
  }
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (d != 0) return;
  deltas[row] = sum;
  log_sums[row] = i < N ? lse[head * N + i] * log2_e : INFINITY;
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

}  // namespace entrain::cuda
