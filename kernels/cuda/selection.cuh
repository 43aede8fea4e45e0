#pragma once
// From weights of windows to the blocks of a query: what selections in double (selection.cu) and in
// float (selection_hopper.cu) share. Both are in a fixed order: nothing but the values decides
// which of two blocks is better.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

/// bf16 queries on Hopper; selection_hopper.cu. Whether it chose; scratch as select_blocks() has
/// it.
bool select_hopper(const Tensor& q, const Tensor& keys, const BlockSelection& selection,
                   const BlockSet& blocks, const Tensor& scratch, const Tensor& read);

#ifdef __CUDACC__

/// The windows that count for a block: by `best` those that overlap it; by `sum` window
/// (block/stride) c + m - n for each m < block/stride and n < length/stride.
class BlockWindows {
 public:
  __device__ BlockWindows(const BlockSelection& s, int c) : best_(s.score == BlockScore::best) {
    const Sizes n(s);
    if (best_) {
      const int before = c * n.block - n.length;  // windows that begin up to there end before it
      begin_ = before < 0 ? 0 : before / n.stride + 1;
      end_ = ((c + 1) * n.block + n.stride - 1) / n.stride;
    } else {
      begin_ = n.in_block() * c - n.in_window() + 1;
      end_ = n.in_block() * (c + 1);
      most_ = min(n.in_block(), n.in_window());
    }
  }
  /// The first and the last block that a window counts for.
  __device__ static int first_block(const BlockSelection& s, int window) {
    const Sizes n(s);
    return s.score == BlockScore::best ? window * n.stride / n.block : window / n.in_block();
  }
  __device__ static int last_block(const BlockSelection& s, int window) {
    const Sizes n(s);
    return s.score == BlockScore::best ? (window * n.stride + n.length - 1) / n.block
                                       : (window + n.in_window() - 1) / n.in_block();
  }

  /// The block's score so far with windows [from, to) added; `weights` begins with theirs. The
  /// best ignores NaN.
  template <class T>
  __device__ T add(T score, const T* weights, int from, int to) const {
    const int begin = max(from, begin_), end = min(to, end_);
    if (best_) {
#pragma unroll 4
      for (int m = begin; m < end; ++m) score = max(score, weights[m - from]);
    } else {
#pragma unroll 4
      for (int m = begin; m < end; ++m) {
        const int times = min(min(m - begin_ + 1, end_ - m), most_);
        score += static_cast<T>(times) * weights[m - from];
      }
    }
    return score;
  }

 private:
  struct Sizes {
    int block, length, stride;

    __device__ explicit Sizes(const BlockSelection& s)
        : block(static_cast<int>(s.block)),
          length(static_cast<int>(s.length)),
          stride(static_cast<int>(s.stride)) {}
    __device__ int in_block() const { return block / stride; }
    __device__ int in_window() const { return length / stride; }
  };

  bool best_;
  int begin_, end_, most_ = 0;
};

/// Bits that rank as scores do, which are 0 or more; NaN is 0.
__device__ __forceinline__ uint64_t rank_of(double score) {
  return score >= 0 ? static_cast<uint64_t>(__double_as_longlong(score)) : 0;
}
__device__ __forceinline__ uint32_t rank_of(float score) {
  return score >= 0 ? __float_as_uint(score) : 0;
}

/// How many of scores [begin, end) rank above `least`; the whole warp.
template <class T, class Rank>
__device__ int count_above(const T* scores, int begin, int end, Rank least) {
  int n = 0;
  for (int c = begin + static_cast<int>(threadIdx.x % 32); c < end; c += 32) {
    n += rank_of(scores[c]) > least ? 1 : 0;
  }
  return __reduce_add_sync(0xffffffffu, n);
}

/// A warp sets the bits of the chosen blocks among [0, own], own the query's block, in its row of
/// half words. The lowest rank to take is found bit by bit.
template <class T>
__device__ void choose(const BlockSelection& s, const T* scores, int own, uint32_t* mask,
                       int64_t half_words) {
  using Rank = decltype(rank_of(T{}));
  const int lane = threadIdx.x % 32;
  const auto least_of = [](int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); };
  const int begin = least_of(s.init_blocks, own + 1);
  const int end = static_cast<int>(own + 1 - s.local_blocks > begin ? own + 1 - s.local_blocks
                                                                    : int64_t{begin});
  const int first = least_of(begin, s.topk), last = least_of(own + 1 - end, s.topk - first);
  const auto left = static_cast<int>(s.topk - first - last);

  Rank least = 0;          // the lowest taken
  int ties = end - begin;  // blocks of that rank to take
  if (left == 0) {
    ties = 0;
    least = ~Rank{0};
  } else if (end - begin > left) {
    for (int bit = 8 * static_cast<int>(sizeof(T)) - 2; bit >= 0; --bit) {
      const Rank higher = least | Rank{1} << bit;
      const int n = count_above(scores, begin, end, higher - 1);
      if (n >= left) least = higher;
      if (n == left) break;
    }
    ties = left - count_above(scores, begin, end, least);
  }
  for (int64_t word = 0; word < half_words; ++word) {
    const int64_t c = word * 32 + lane;
    const bool in = c >= begin && c < end;
    const Rank rank = in ? rank_of(scores[c]) : 0;
    const unsigned equal = __ballot_sync(0xffffffffu, in && rank == least);
    const int before = __popc(equal & ((1u << lane) - 1));  // among equal ones the lower goes first
    const bool taken = in && (rank > least || (rank == least && before < ties));
    const bool forced = c < first || (c >= end && c < end + last);
    const unsigned bits = __ballot_sync(0xffffffffu, taken || forced);
    if (lane == 0) mask[word] = bits;
    ties -= __popc(equal);
  }
}

#endif  // __CUDACC__

}  // namespace entrain::cuda
