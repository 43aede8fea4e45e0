#pragma once
// Which queries attend a tile of keys: what kernels for dk and dv go through.
#include "kernels/cuda/attention_bf16.cuh"

namespace entrain::cuda {

constexpr int step_rows = 64;  // of queries and heads; a list is read in such steps
constexpr int scanned = 1024;  // queries whose masks are looked at together

/// Of queries [first, last), those that see something of a tile of keys, and those that see all.
struct SeeingQueries {
  int begin, end, all_begin, all_end;

  __device__ SeeingQueries(const AttentionProblem& p, int tile, int first, int last) {
    const int64_t key = int64_t{tile} * key_tile, last_key = min(key + key_tile, p.keys) - 1;
    const auto within = [&](int64_t token) {
      return static_cast<int>(max(int64_t{first}, min(token - p.first, int64_t{last})));
    };
    begin = within(p.sight.first_token(key));
    end = within(p.sight.last_token(last_key));
    all_begin = within(p.sight.first_token(last_key));
    all_end = within(p.sight.last_token(key));
  }
};

/// The queries that attend a tile, as a list in shared memory, gathered from the masks
/// (attention_bf16_dkdv.cu). The first 4 warps of a thread block find them, in ascending order.
class AttendingQueries {
 public:
  static constexpr int ints = scanned + step_rows + 32;  // of shared memory

  /// Of queries [begin, end) of a kv head of the batch's.
  __device__ AttendingQueries(const AttentionProblem& p, int group, int tile, int begin, int end,
                              int* shared)
      : list_(shared),
        votes_(reinterpret_cast<uint32_t*>(shared + scanned + step_rows)),
        seeing_(p, tile, begin, end) {
    const int64_t key = int64_t{tile} * key_tile;
    const int64_t last = min(key + key_tile, p.keys) - 1;
    const int64_t first_block = key / p.block, blocks = last / p.block - first_block + 1;
    masks_ = p.mask ? p.mask + group * p.N * p.words + first_block / 64 : nullptr;
    blocks_ = bits_below(static_cast<int>(blocks)) << (first_block % 64);
    words_ = p.words;
    whole_ = !p.mask || p.block % key_tile == 0;
  }

  __device__ bool more() const { return seeing_.begin < seeing_.end; }
  /// Looks at the next queries, if there are more(). All threads call it, after a barrier that
  /// follows the last use of the list.
  __device__ void append() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int i = 0; i < rounds; i += together) {
      uint64_t words[together];
#pragma unroll
      for (int j = 0; j < together; ++j) words[j] = word(min(query(i + j), seeing_.end - 1));
#pragma unroll
      for (int j = 0; j < together; ++j) {
        const bool attends = words[j] & blocks_ && query(i + j) < seeing_.end;
        const uint32_t vote = __ballot_sync(0xffffffffu, attends);
        if (lane == 0) votes_[(i + j) * warps + warp] = vote;
      }
    }
    meet();
    const uint32_t votes = votes_[lane];
    int before = __popc(votes);  // becomes the sum up to here
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += left;
    }
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      const uint32_t from_here = __shfl_sync(0xffffffffu, votes, i * warps + warp) >> lane;
      const int place = __shfl_sync(0xffffffffu, before, i * warps + warp) - __popc(from_here);
      if (from_here & 1) {
        list_[count_ + place] = query(i);
      }
    }
    count_ += __shfl_sync(0xffffffffu, before, 31);
    seeing_.begin += scanned;
    meet();
  }
  __device__ int count() const {
    return count_;
  }
  __device__ int operator[](int i) const {
    return list_[i];
  }
  /// The tile's word in a query's mask.
  __device__ uint64_t word(int query) const {
    return masks_ ? masks_[query * words_] : ~uint64_t{0};
  }
  /// Whether queries [i, i + count) of the list attend all keys of the tile.
  __device__ bool whole(int i, int count) const {
    const int first = list_[i], last = list_[i + count - 1];
    return whole_ && first >= seeing_.all_begin && last < seeing_.all_end;
  }
  /// Forgets the first queries; fewer than step_rows stay. All threads call it, after a barrier.
  __device__ void drop(int queries) {
    count_ -= queries;
    if (static_cast<int>(threadIdx.x) < count_) list_[threadIdx.x] = list_[queries + threadIdx.x];
  }

 private:
  static constexpr int rounds = scanned / attention_threads, warps = attention_threads / 32;
  static constexpr int together = 4;  // masks on their way
  static_assert(rounds * warps == 32);

  __device__ static void meet() {
    cuda::meet(1, attention_threads);
  }
  /// The thread's query of a round.
  __device__ int query(int round) const {
    return seeing_.begin + round * attention_threads + static_cast<int>(threadIdx.x);
  }

  int* list_;
  uint32_t* votes_;  // those of 32 queries, of which each round has one for each warp
  int count_ = 0;
  SeeingQueries seeing_;   // from those on that have not been looked at
  bool whole_;             // a query that attends a key of the tile attends all that it sees
  const uint64_t* masks_;  // the word of the tile in the masks of this kv head's queries
  int64_t words_;
  uint64_t blocks_;  // of the tile, in that word
};

}  // namespace entrain::cuda
