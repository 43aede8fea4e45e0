#pragma once
// How splits of the keys of a decoding step (attention_decode.cu), a block of threads each, merge
// their sums: blocks of a cluster send them to each other, every block the rows that another puts;
// others leave them in memory, where the last one to finish finds them.
#include "kernels/cuda/attention_bf16.cuh"
#include "kernels/cuda/entmax_row.cuh"
#include "kernels/cuda/hopper.cuh"

namespace entrain::cuda {

constexpr int decode_threads = 256;

/// Of weights 2^(score - top) of a row: their sum.
struct RowWeight {
  float top, sum;
};

/// From weights that were scaled to one top to weights scaled to another.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == to ? 1 : power_of_2(from - to);
}

/// The weight of a row of which n parts are known, so many apart.
__device__ __forceinline__ RowWeight merge(const RowWeight* parts, int n, int apart) {
  RowWeight all{-INFINITY, 0};
#pragma unroll 4
  for (int i = 0; i < n; ++i) all.top = fmaxf(all.top, parts[i * apart].top);
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    all.sum += parts[i * apart].sum * rescale(parts[i * apart].top, all.top);
  }
  return all;
}

__device__ __forceinline__ void add_scaled(float4& sum, const float4& x, float factor) {
  sum.x += x.x * factor;
  sum.y += x.y * factor;
  sum.z += x.z * factor;
  sum.w += x.w * factor;
}

/// Where the sums of rows go once all keys are in them.
struct Output {
  const AttentionProblem& p;
  const QueryTile& queries;
  const HeadRows o;
  float* const lse;

  __device__ void put(int row, int d, const float4& sum, const RowWeight& weight) const {
    const float inverse = weight.sum > 0 ? 1 / weight.sum : weight.sum;  // an empty row gives 0
    *reinterpret_cast<uint2*>(queries.at(o, row) + d) =
        make_uint2(pack(sum.x * inverse, sum.y * inverse), pack(sum.z * inverse, sum.w * inverse));
    if (d > 0) return;
    // +infinity makes the backward pass of an empty row exp(-infinity) = 0.
    lse[queries.index(p, row)] =
        weight.sum == 0 ? INFINITY : weight.top * (1 / log2_e) + logf(weight.sum);
  }
};

/// How the blocks of a cluster, each a split, merge: they share the rows out, and send each other
/// their sums of them. In shared memory, at a block whose rows they are.
template <int D, int rows>
struct ClusterMerge {
  float4 sums[rows * D / 4];  // [splits, own rows, D]
  RowWeight weights[rows];    // [splits, own rows]

  /// Both are powers of two.
  __device__ static int own_log(int splits) { return __ffs(rows) - __ffs(splits); }
  __device__ static int own_rows(int splits) { return 1 << own_log(splits); }
  /// That are sent to a split.
  __device__ static int bytes(const QueryTile& queries, int split, int splits) {
    int of_queries = 0;
    for (int i = 0; i < own_rows(splits); ++i) {
      of_queries += queries.has(split * own_rows(splits) + i) ? 1 : 0;
    }
    return of_queries * splits * static_cast<int>(sizeof(float) * D + sizeof(RowWeight));
  }
  __device__ void send(int split, int splits, int row, int d, const float4& sum,
                       const RowWeight& weight, uint32_t barrier) {
    const int own = own_rows(splits), at = split * own + (row & (own - 1));
    const auto to = static_cast<uint32_t>(row >> own_log(splits));
    cuda::send(sums + (at * D + d) / 4, sum, barrier, to);
    if (d > 0) return;
    cuda::send(reinterpret_cast<float2*>(weights + at), make_float2(weight.top, weight.sum),
               barrier, to);
  }
  /// In order, once all have sent theirs.
  __device__ void put(const Output& output, int split, int splits) const {
    const int own = own_rows(splits);
    for (int x = static_cast<int>(threadIdx.x); x < own * D / 4; x += decode_threads) {
      const int i = x / (D / 4), row = split * own + i;
      if (!output.queries.has(row)) continue;
      const RowWeight all = merge(weights + i, splits, own);
      float4 sum = {};
#pragma unroll 8
      for (int s = 0; s < splits; ++s) {
        add_scaled(sum, sums[s * own * (D / 4) + x], rescale(weights[s * own + i].top, all.top));
      }
      output.put(row, x % (D / 4) * 4, sum, all);
    }
  }
};

// Where splits are no cluster, what they leave in memory for the last one. 4.3 MB.
constexpr int most_split_blocks = 256;  // at most one a multiprocessor
constexpr int most_splits = 64;
static __device__ float split_sums[most_split_blocks * 32 * 128];   // [group, split, rows, D]
static __device__ RowWeight split_weights[most_split_blocks * 32];  // [group, split, rows]
static __device__ unsigned splits_done[most_split_blocks];          // [group], 0 between launches

/// Whether this block is the last of a group's to come here: it finds what all of them left.
__device__ __forceinline__ bool last_of_splits(int group, int splits) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(&splits_done[group], 1) ==
                                                             static_cast<unsigned>(splits) - 1);
  if (!last) return false;
  __threadfence();
  if (threadIdx.x == 0) splits_done[group] = 0;
  return true;
}

/// What splits are scaled by, and the weights they add up to.
template <int rows>
struct Merge {
  float factors[most_splits * rows];  // [splits, rows]
  RowWeight all[rows];

  /// Lanes share a row. A barrier must follow.
  __device__ void weigh(int first, int splits) {
    constexpr int width = decode_threads / rows;
    const Lanes lanes(width);
    const int row = static_cast<int>(threadIdx.x) / width;
    float2 parts[most_splits / width];
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int x = 0; x < most_splits / width; ++x) {
      const int i = x * width + lanes.rank;
      parts[x] = make_float2(-INFINITY, 0);
      if (i < splits) {
        parts[x] = __ldcg(reinterpret_cast<const float2*>(split_weights + first + i * rows + row));
      }
    }
    for (const float2& part : parts) top = fmaxf(top, part.x);
    top = lanes.max(top);
#pragma unroll
    for (int x = 0; x < most_splits / width; ++x) {
      const int i = x * width + lanes.rank;
      if (i >= splits) break;
      const float factor = rescale(parts[x].x, top);
      factors[i * rows + row] = factor;
      sum += parts[x].y * factor;
    }
    sum = lanes.sum(sum);
    if (lanes.rank == 0) all[row] = {top, sum};
  }
};

/// Merges the splits of a group, whose parts begin at `first`, in order.
template <int D, int rows>
__device__ void merge_splits(const Output& output, int first, int splits, Merge<rows>& merge) {
  constexpr int step = decode_threads / (D / 4), own = rows / step;  // rows at a time, and so on
  constexpr int unroll = 16 / own;  // so many sums are on their way at once
  merge.weigh(first, splits);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / (D / 4);
  const int d = static_cast<int>(threadIdx.x) % (D / 4) * 4;
  const float* from = split_sums + (first + row) * D + d;
  float4 sums[own] = {};
#pragma unroll unroll
  for (int i = 0; i < splits; ++i) {
#pragma unroll
    for (int x = 0; x < own; ++x) {
      add_scaled(sums[x], __ldcg(reinterpret_cast<const float4*>(from + (i * rows + x * step) * D)),
                 merge.factors[i * rows + row + x * step]);
    }
  }
#pragma unroll
  for (int x = 0; x < own; ++x) {
    const int at = row + x * step;
    if (output.queries.has(at)) output.put(at, d, sums[x], merge.all[at]);
  }
}

}  // namespace entrain::cuda
