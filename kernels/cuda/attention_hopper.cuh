#pragma once
// What the two halves of Hopper's dense causal backward pass share (attention_hopper_dq.cu,
// attention_hopper_dkdv.cu).
//
// In both, a thread block stays on its multiprocessor and takes work items in turn. An item is a
// tile of rows whose gradients it sums, 64 a warpgroup, which go through a sequence of 64-row
// blocks of the other side, a step each. One more warp copies these ahead through a ring of stages.
// A warpgroup holds its rows as left operands and computes from them, step by step,
//   S = own other^T,  P = exp2(S scale - lse),  dP = own' other'^T,  dS = P (dP - delta),
// in dq with queries as its own rows, in dk and dv with keys; then the sums in sum += P other' and
// sum += dS other, whose left operands are the accumulators of before, rounded. Products run beside
// the arithmetic on the results of earlier ones.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/hopper.cuh"

namespace entrain::cuda {

/// Queries of a head, with what fills up the last block.
inline int64_t padded_rows(const AttentionProblem& p) {
  return ceil_div(p.N, block_rows) * block_rows;
}

/// What both halves need of each query besides its rows: f32 [B, Hq, padded_rows()].
struct QueryNumbers {
  const float* log_sums;  // lse in base 2, infinity after the last row
  const float* deltas;    // sums of o dout over D, 0 after the last row
};
/// In scratch of query_numbers_scratch() bytes; attention_hopper_numbers.cu.
QueryNumbers query_numbers(const AttentionProblem& p, const Rows<bf16>& o, const Rows<bf16>& dout,
                           const float* lse, float* scratch);
/// The same for the block-sparse engine, whose steps take single queries: (log sum, delta)
/// [B, Hkv, N, g], a query's side by side.
const float2* query_pairs(const AttentionProblem& p, const Rows<bf16>& o, const Rows<bf16>& dout,
                          const float* lse, float* scratch);

/// A problem as the kernels take it.
struct DenseBackward {
  int B, Hq, Hkv, g, N;
  int blocks;  // of 64 rows, the last one perhaps with fewer
  QueryNumbers numbers;
  float scale;  // of logits in base e

  __device__ int64_t row(int b, int head, int i) const {
    return (int64_t{b} * Hq + head) * blocks * block_rows + i;
  }
};

/// dk and dv; attention_hopper_dkdv.cu.
void hopper_key_gradients(const AttentionProblem& p, const DenseBackward& dense,
                          const Rows<bf16>& q, const Rows<bf16>& k, const Rows<bf16>& v,
                          const Rows<bf16>& dout, const Rows<bf16>& dk, const Rows<bf16>& dv);

#ifdef __CUDACC__

template <class F>
void by_dense_head_dim(int64_t D, F f) {
  if (D == 64) return f(std::integral_constant<int, 64>{});
  f(std::integral_constant<int, 128>{});
}

/// Two neighbouring floats in shared memory.
__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

/// Calls f(item) for the items of this thread block. Items come longest first; every other round of
/// blocks goes backwards, so that all get about the same work.
template <class F>
__device__ __forceinline__ void for_items(int items, F f) {
  const auto blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  for (int round = 0; round * blocks < items; ++round) {
    const int item = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (item < items) f(item);
  }
}

/// x, which is the same for all of a warp. The compiler then knows it, and computes descriptors of
/// blocks, which products take from registers of the warp, there: else, lane by lane, each is moved
/// to these first.
__device__ __forceinline__ int uniform(int x) {
  return __shfl_sync(~0u, x, 0);
}

/// A place in a ring of stages, each with a barrier for "full" and one for "empty".
template <int stages>
struct Ring {
  uint32_t barriers;
  int stage = 0;
  uint32_t parity = 0;

  __device__ uint32_t full() const { return barriers + 8 * stage; }
  __device__ uint32_t empty(int of) const { return barriers + 8 * (stages + of); }
  __device__ void wait_full() const { barrier_wait(full(), parity); }
  /// The same for all of a warp, without waiting.
  __device__ bool is_full() const { return __all_sync(~0u, barrier_passed(full(), parity)); }
  __device__ void wait_empty() const { barrier_wait(empty(stage), parity ^ 1); }
  __device__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  /// Of arrivals at a stage until it is full and until it is empty.
  __device__ static void init(uint32_t barriers, int consumers, int producers = 1) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(barriers + 8 * i, producers);
      barrier_init(barriers + 8 * (stages + i), consumers);
    }
  }
};

/// One arrival for each warp, when all its lanes are here.
__device__ __forceinline__ void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

/// Copies a block of D columns.
template <int D>
__device__ __forceinline__ void copy_block(Block to, const CUtensorMap& map, uint32_t barrier,
                                           int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    copy_panel(to.address + panel * panel_bytes, map, barrier, panel * 64, row, head, batch);
  }
}

/// A warpgroup's block as a left operand, in shared memory or in registers.
///
/// In registers it halves what products read from shared memory. But nvcc 13.0 (ptxas) gives these
/// registers to the other left operands of a loop wherever those are as many, though they are
/// needed again in its next round: only where D = 128 are they not.
template <int D, bool in_registers>
class OwnBlock {
 public:
  __device__ explicit OwnBlock(Block block) : block_(block) {
    if constexpr (in_registers) {
      const int row = static_cast<int>(threadIdx.x) % warpgroup / 32 * 16;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) block.left(fragments_[step], row, step);
    }
  }
  /// c = own other^T
  __device__ void by_rows(float (&c)[8][4], Block other) const {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      if constexpr (in_registers) {
        product<false>(c, fragments_[step], other.rows(step), step > 0);
      } else {
        product(c, block_.rows(step), other.rows(step), step > 0);
      }
    }
  }

 private:
  Block block_;
  Fragment fragments_[in_registers ? D / 16 : 1];
};

/// An accumulator, rounded, as a left operand.
__device__ __forceinline__ void round_to(Fragment (&to)[4], const float (&from)[8][4]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &from[2 * step + i / 2][i % 2 * 2];
      to[step][i] = pack(pair[0], pair[1]);
    }
  }
}

/// sum += a other
template <int n>
__device__ __forceinline__ void add_product(float (&sum)[n][4], const Fragment (&a)[4],
                                            Block other) {
#pragma unroll
  for (int step = 0; step < 4; ++step) product<true>(sum, a[step], other.columns(step), true);
}

/// A step of queries' gradients: sum += dS k, whose products still run when it returns.
/// meanwhile(shifts) is called while S is on its way; it tells what is added to the logits, in base
/// 2, of each of the thread's two rows; delta: theirs. free_before() is called once the step before
/// has done with its keys, hide(P) once P is known.
template <int D, bool q_in_registers, bool dout_in_registers, class Meanwhile, class FreeBefore,
          class Hide>
__device__ __forceinline__ void add_query_gradients(float (&sum)[D / 8][4], float (&ds)[8][4],
                                                    const OwnBlock<D, q_in_registers>& q,
                                                    const OwnBlock<D, dout_in_registers>& dout,
                                                    Block k, Block v, float scale,
                                                    Meanwhile meanwhile, const float (&delta)[2],
                                                    FreeBefore free_before, Hide hide) {
  float s[8][4], shifts[2];
  products_fence();
  q.by_rows(s, k);
  products_commit();
  dout.by_rows(ds, v);
  products_commit();
  meanwhile(shifts);
  products_wait<1>();
  pin(s);
  free_before();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = power_of_2(fmaf(s[j][e], scale, shifts[e / 2]));
  }
  hide(s);  // its branch also keeps ptxas from computing powers after dP instead of beside it
  products_wait<0>();
  pin(ds);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[j][e] = s[j][e] * (ds[j][e] - delta[e / 2]);
  }
  Fragment rounded[4];
  round_to(rounded, ds);
  products_fence();
  add_product(sum, rounded, k);
  products_commit();
}

/// A step of keys' gradients: dk_sum += dS^T q, whose products still run when it returns, and
/// dv_sum += P^T dO. log_sums(j): what is subtracted from the logits, in base 2, of the thread's
/// columns 8 j + 2 (thread % 4) and the next; deltas: where theirs are for j = 0. free_before() is
/// called once the step before has done with its rows, hide(P) once P is known, free_dout(), where
/// D > 64, once this step has done with dO.
template <int D, class LogSums, class FreeBefore, class Hide, class FreeDout>
__device__ __forceinline__ void add_key_gradients(
    float (&dk_sum)[D / 8][4], float (&dv_sum)[D / 8][4], const OwnBlock<D, false>& k,
    const OwnBlock<D, false>& v, Block q, Block dout, float scale, LogSums log_sums,
    uint32_t deltas, FreeBefore free_before, Hide hide, FreeDout free_dout) {
  float s[8][4], dp[8][4];
  Fragment weights[4], ds[4];
  products_fence();
  k.by_rows(s, q);
  products_commit();
  v.by_rows(dp, dout);
  products_commit();
  float2 of_rows[8];  // of the other side, which are columns here
#pragma unroll
  for (int j = 0; j < 8; ++j) of_rows[j] = log_sums(j);
  products_wait<1>();
  pin(s);
  free_before();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    s[j][0] = power_of_2(fmaf(s[j][0], scale, -of_rows[j].x));
    s[j][1] = power_of_2(fmaf(s[j][1], scale, -of_rows[j].y));
    s[j][2] = power_of_2(fmaf(s[j][2], scale, -of_rows[j].x));
    s[j][3] = power_of_2(fmaf(s[j][3], scale, -of_rows[j].y));
  }
  hide(s);
  round_to(weights, s);
  products_fence();
  add_product(dv_sum, weights, dout);
  products_commit();

#pragma unroll
  for (int j = 0; j < 8; ++j) of_rows[j] = load_pair(deltas + 32 * j);
  products_wait<D == 64 ? 1 : 0>();  // registers for both weights and ds
  pin(dp);
  if constexpr (D > 64) {
    pin(dv_sum);
    free_dout();
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    dp[j][0] = s[j][0] * (dp[j][0] - of_rows[j].x);
    dp[j][1] = s[j][1] * (dp[j][1] - of_rows[j].y);
    dp[j][2] = s[j][2] * (dp[j][2] - of_rows[j].x);
    dp[j][3] = s[j][3] * (dp[j][3] - of_rows[j].y);
  }
  round_to(ds, dp);
  products_fence();
  add_product(dk_sum, ds, q);
  products_commit();
}

/// Writes a warpgroup's sums, its rows starting at `first`, to those of a head.
template <int n>
__device__ __forceinline__ void store_sums(const float (&sum)[n][4], float factor,
                                           const Rows<bf16>& to, int b, int head, int first,
                                           int N) {
  const int thread = static_cast<int>(threadIdx.x) % warpgroup;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + thread / 32 * 16 + i * 8 + thread % 32 / 4;
    if (row < 0 || row >= N) continue;
    bf16* at = to.at(b, head, row) + thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      *reinterpret_cast<uint32_t*>(at + 8 * j) =
          pack(sum[j][2 * i] * factor, sum[j][2 * i + 1] * factor);
    }
  }
}

#endif  // __CUDACC__

}  // namespace entrain::cuda
