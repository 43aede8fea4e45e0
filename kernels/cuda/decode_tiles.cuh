#pragma once
// Which tiles of keys the few queries of a decoding step attend (attention_decode.cu).
#include "kernels/cuda/attention_bf16.cuh"

namespace entrain::cuda {

/// Those of a block's queries, a bit each, in shared memory: those of any of them, then those that
/// masks give each.
class AttendedTiles {
 public:
  static size_t bytes(const AttentionProblem& p) {
    const int64_t queries = p.mask ? p.N : 0;
    return sizeof(uint64_t) * static_cast<size_t>((1 + queries) * words_of(p));
  }

  /// All threads call it; a barrier must follow.
  __device__ AttendedTiles(const AttentionProblem& p, const QueryTile& queries, char* shared)
      : masked_(p.mask), words_(static_cast<int>(words_of(p))) {
    any_ = reinterpret_cast<uint64_t*>(shared);
    const int begin = seen_by(p, queries.first).begin / key_tile;
    const int end = (seen_by(p, queries.first + queries.count - 1).end + key_tile - 1) / key_tile;
    for (int w = static_cast<int>(threadIdx.x); w < words_; w += static_cast<int>(blockDim.x)) {
      const bool choose = masked_ && w < static_cast<int>(p.words);
      uint64_t any = masked_ ? 0 : ~uint64_t{0};
      for (int i = 0; choose && i < queries.count; ++i) {
        const uint64_t bits = p.mask[(queries.index(p) + i) * p.words + w];
        any_[(1 + i) * words_ + w] = bits;
        any |= bits;
      }
      any_[w] = any & bits_below(end - 64 * w) & ~bits_below(begin - 64 * w);
    }
  }

  /// All lanes of a warp call it.
  __device__ int count() const {
    int sum = 0;
    for (int w = static_cast<int>(threadIdx.x) % 32; w < words_; w += 32) sum += __popcll(any_[w]);
    return __reduce_add_sync(0xffffffffu, sum);
  }
  /// Whether a query's mask, where there is one, has a tile, one of these. No branches.
  __device__ bool of(int query, int tile) const {
    const uint64_t* bits = any_ + (masked_ ? (1 + query) * words_ : 0);
    return bits[tile / 64] >> (tile % 64) & 1;
  }

  /// The attended tiles from the n-th on, one after the other.
  class Walk {
   public:
    /// All lanes of a warp call it: they look at a word each.
    __device__ Walk(const AttendedTiles& tiles, int n) : any_(tiles.any_) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      for (int w0 = 0; w0 < tiles.words_; w0 += 32) {
        const int in_word = w0 + lane < tiles.words_ ? __popcll(any_[w0 + lane]) : 0;
        int up_to = in_word;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int left = __shfl_up_sync(0xffffffffu, up_to, offset);
          if (lane >= offset) up_to += left;
        }
        const unsigned beyond = __ballot_sync(0xffffffffu, up_to > n);
        if (beyond == 0) {
          n -= __shfl_sync(0xffffffffu, up_to, 31);
          continue;
        }
        const int found = __ffs(static_cast<int>(beyond)) - 1;
        n -= __shfl_sync(0xffffffffu, up_to - in_word, found);
        word_ = w0 + found;
        for (rest_ = any_[word_]; n > 0; --n) rest_ &= rest_ - 1;
        return;
      }
    }
    __device__ int next() {
      while (!rest_) rest_ = any_[++word_];
      const int tile = 64 * word_ + __ffsll(static_cast<int64_t>(rest_)) - 1;
      rest_ &= rest_ - 1;
      return tile;
    }

   private:
    const uint64_t* any_;
    int word_ = 0;
    uint64_t rest_ = 0;
  };

 private:
  __host__ __device__ static int64_t words_of(const AttentionProblem& p) {
    return p.keys / (64 * key_tile) + 1;
  }

  bool masked_;
  int words_;
  uint64_t* any_;
};

}  // namespace entrain::cuda
