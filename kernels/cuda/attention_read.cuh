#pragma once
// What queries read, counted from masks and sights alone.
#include "kernels/cuda/attention.cuh"

namespace entrain::cuda {

/// Sums of some queries; see ReadField.
struct ReadCount {
  int64_t pairs = 0, visits = 0, queries = 0, causal = 0;

  /// Query i of kv head r and batch b. Lanes that share a query, each its `rank`, take words of its
  /// mask in turns.
  __device__ void add(const AttentionProblem& p, int64_t b, int64_t r, int64_t i, int rank = 0,
                      int lanes = 1) {
    const int64_t token = p.first + i, end = p.sight.end(token), begin = p.sight.begin(end);
    if (rank == 0) {
      queries += 1;
      causal += token + 1;
    }
    if (begin >= end) return;
    const int64_t c0 = begin / p.block, c1 = (end - 1) / p.block;  // first and last block in sight
    if (!p.mask) {
      if (rank > 0) return;
      visits += c1 - c0 + 1;
      pairs += end - begin;
      return;
    }
    const uint64_t* mask = p.mask + ((b * p.Hkv + r) * p.N + i) * p.words;
    int64_t attended = 0;
    for (int64_t w = c0 / 64 + rank; w <= c1 / 64; w += lanes) {
      uint64_t bits = mask[w];
      if (w == c0 / 64) bits &= ~uint64_t{0} << (c0 % 64);
      if (w == c1 / 64) bits &= ~uint64_t{0} >> (63 - c1 % 64);
      attended += __popcll(bits);
    }
    visits += attended;
    pairs += attended * p.block;  // less what the first and the last block have out of sight
    if (rank > 0) return;
    if (mask[c0 / 64] >> (c0 % 64) & 1) pairs -= begin - c0 * p.block;
    if (mask[c1 / 64] >> (c1 % 64) & 1) pairs -= (c1 + 1) * p.block - end;
  }
};

/// Where counts go: read [Hkv, read_fields], or null.
struct ReadSums {
  double* read;
  bool only_flops;

  /// Counts are whole numbers and flops multiples of 4 g D, exact in double, so the order of adding
  /// does not show.
  __device__ void add(const AttentionProblem& p, int64_t r, const ReadCount& count) const {
    double* fields = read + r * read_fields;
    atomicAdd(fields + read_flops, static_cast<double>((4 + 8) * count.pairs * p.g * p.D));
    if (only_flops) return;
    atomicAdd(fields + read_pairs, static_cast<double>(count.pairs));
    atomicAdd(fields + read_blocks, static_cast<double>(count.visits));
    atomicAdd(fields + read_queries, static_cast<double>(count.queries));
    atomicAdd(fields + read_causal, static_cast<double>(count.causal));
  }
};

}  // namespace entrain::cuda
