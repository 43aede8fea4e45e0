#pragma once
// Thresholds of rows whose scores a warp sees once, 64 at a time, and then no more (see
// route_hopper.cu).
//
// For alpha > 1 a row's support lies within 1 of its largest entry, so what may be in it is few: a
// list in shared memory, to which entries are added as they come, with the chunks they are of. The
// threshold of entries so far is a lower bound of that of all: where a list is full, it drops those
// below.
#include "kernels/cuda/entmax_float.cuh"

namespace entrain::cuda {

/// Lists of a warp's 16 rows in shared memory: entries and the chunks that they are of. Rows r and
/// r + 8, which the same lanes have, share words of chunks, half each: a chunk is as far from its
/// entry wherever that is in a list, so that one address does for both.
class RowLists {
 public:
  static constexpr int capacity = 96;
  static constexpr int bytes = 16 * capacity * 6;
  static constexpr int chunks = 1 << 16;  // that a half can tell apart

  __device__ explicit RowLists(void* at) : at_(static_cast<float*>(at)) {}
  __device__ float* entries(int row) const { return at_ + row * capacity; }
  /// Of an entry of row r or r + 8, i = 0 or 1.
  __device__ static uint16_t& chunk(float* entry, unsigned i) {
    return reinterpret_cast<uint16_t*>(entry)[(32 - 16 * i) * capacity + i];
  }

 private:
  float* at_;
};

/// What a row's list came to.
struct alignas(8) ListEnd {
  float threshold;
  int size;
};

/// What the first sweep finds of a warp's 16 rows: of each lane's two the threshold. A row's
/// numbers are the same in the four lanes that share it.
template <Curve curve>
class Thresholds {
 public:
  static constexpr bool keeps_lists = true;

  float threshold[2] = {-INFINITY, -INFINITY};  // of the list; before, a lower bound
  bool lost[2] = {false, false};                // not all of the support is in the list

  __device__ Thresholds(const FloatEntmax<curve>& entmax, const RowLists& lists)
      : entmax_(entmax), lists_(lists), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ int size(int i) const { return size_[i]; }
  __device__ void add(const float (&z)[8][4], int tile) {
    raise_bounds(z);
    Found found = find(z);
    if (__any_sync(0xffffffffu, overflows(found, 0) || overflows(found, 1))) {
      drop();
      found = find(z);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        lost[i] = lost[i] || overflows(found, i);
        if (lost[i]) forget(found, i);
      }
    }
    append(z, tile, found);
  }
  /// Finds the lists' thresholds: Newton's steps of both rows side by side, on entries that the
  /// lane keeps in registers, as far as they go. Lists are seldom longer.
  __device__ void finish() {
    constexpr int kept = 4, step = 16;  // lanes take four entries of every sixteen
    const int first = lane_ % 4 * 4;
    pad();
    const int most = __reduce_max_sync(0xffffffffu, max(size_[0], size_[1]));
    float4 fours[2][kept];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < kept; ++k) fours[i][k] = entries(i, step * k + first);
    }
    bool moves[2] = {size_[0] > 0, size_[1] > 0};
    for (int n = 0; n < entmax_.most_steps && __any_sync(0xffffffffu, moves[0] || moves[1]); ++n) {
      float f[4] = {0, 0, 0, 0}, df[4] = {0, 0, 0, 0};  // of each row two parts
      const auto add = [&](int i, const float4& a) {
        entmax_.add(a.x - threshold[i], f[i], df[i]);
        entmax_.add(a.y - threshold[i], f[i + 2], df[i + 2]);
        entmax_.add(a.z - threshold[i], f[i], df[i]);
        entmax_.add(a.w - threshold[i], f[i + 2], df[i + 2]);
      };
#pragma unroll
      for (int k = 0; k < kept; ++k) {
        if (step * k >= most) break;
        add(0, fours[0][k]);
        add(1, fours[1][k]);
      }
      for (int c = step * kept + first; c - first < most; c += step) {
        add(0, entries(0, c));
        add(1, entries(1, c));
      }
      float sums[4] = {f[0] + f[2], f[1] + f[3], df[0] + df[2], df[1] + df[3]};
#pragma unroll
      for (int o = 2; o > 0; o /= 2) {
#pragma unroll
        for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, o);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        moves[i] = moves[i] && entmax_.improve(threshold[i], sums[i], sums[i + 2]);
      }
    }
  }

 private:
  /// Entries above the bound: a bit for each, from 16 on for the lane's second row; how many there
  /// are in the lanes before, and in all four, the second row's times 2^16.
  struct Found {
    uint32_t bits, before, total;
  };

  __device__ void raise_bounds(const float (&z)[8][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float best = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) best = fmaxf(best, fmaxf(z[j][2 * i], z[j][2 * i + 1]));
      threshold[i] = fmaxf(threshold[i], Lanes(4).max(best) - 1);
    }
  }
  __device__ Found find(const float (&z)[8][4]) const {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (z[j][e] > threshold[e / 2]) bits |= 1u << bit(j, e);
      }
    }
    const uint32_t count = __popc(bits & 0xffffu) | __popc(bits >> 16) << 16;
    uint32_t sum = count;  // of the lanes up to this one
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, sum, o, 4);
      if (lane_ % 4 >= o) sum += below;
    }
    Found found = {bits, sum - count, __shfl_sync(0xffffffffu, sum, 3, 4)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lost[i]) forget(found, i);
    }
    return found;
  }
  __device__ static void forget(Found& found, int i) {
    found.bits &= ~(0xffffu << 16 * i);
    found.total &= ~(0xffffu << 16 * i);
  }
  __device__ static constexpr int bit(int j, int e) {
    return e / 2 * 16 + 2 * j + e % 2;
  }
  __device__ static int part(uint32_t both, int i) {
    return both >> 16 * i & 0xffffu;
  }
  __device__ bool overflows(const Found& found, int i) const {
    return size_[i] + part(found.total, i) > RowLists::capacity;
  }
  __device__ void append(const float (&z)[8][4], int tile, const Found& found) {
    if (found.bits != 0) {
      const int first = 64 * tile + lane_ % 4 * 2;
      float* to[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = list(i) + size_[i] + part(found.before, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if ((found.bits >> bit(j, e) & 1) == 0) continue;
          *to[e / 2] = z[j][e];
          RowLists::chunk(to[e / 2]++, e / 2) = static_cast<uint16_t>(first + 8 * j + e % 2);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) size_[i] += part(found.total, i);
  }

  /// Drops entries that are not above their list's threshold, which becomes the bound.
  __device__ void drop() {
    pad();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      threshold[i] = entmax_.template threshold<4>(list(i), size_[i], threshold[i]);
      keep_above(threshold[i], i);
    }
  }
  /// Lists end at multiples of four.
  __device__ void pad() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int end = (size_[i] + 3) / 4 * 4, c = size_[i] + lane_ % 4;
      if (c < end) list(i)[c] = -INFINITY;
    }
    __syncwarp();
  }
  /// Of the lane's row i, from c on, a multiple of four.
  __device__ float4 entries(int i, int c) const {
    return c < size_[i] ? *reinterpret_cast<const float4*>(list(i) + c)
                        : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  }
  /// Keeps these entries of the lane's row i; whole warps together.
  __device__ void keep_above(float t, int i) {
    float* const row = list(i);
    const int rank = lane_ % 4;
    int kept = 0;
    for (int c = rank; __any_sync(0xffffffffu, c - rank < size_[i]); c += 4) {
      const float a = c < size_[i] ? row[c] : -INFINITY;
      const uint16_t chunk = a > t ? RowLists::chunk(row + c, i) : 0;
      const uint32_t all = __ballot_sync(0xffffffffu, a > t) >> (lane_ - rank) & 0xfu;
      if (a > t) {
        float* const to = row + kept + __popc(all & ((1u << rank) - 1));  // what all have read
        *to = a;
        RowLists::chunk(to, i) = chunk;
      }
      kept += __popc(all);
      __syncwarp();
    }
    size_[i] = kept;
  }
  /// Of the lane's row i.
  __device__ float* list(int i) const {
    return lists_.entries(lane_ / 4 + 8 * i);
  }

  const FloatEntmax<curve>& entmax_;
  const RowLists lists_;
  const int lane_;
  int size_[2] = {0, 0};
};

/// For alpha = 1 the threshold is the log of the sum of exponentials, which needs no list.
template <>
class Thresholds<Curve::exponential> {
 public:
  static constexpr bool keeps_lists = false;

  float threshold[2];
  bool lost[2] = {false, false};

  __device__ Thresholds(const FloatEntmax<Curve::exponential>&, const RowLists&) {}

  __device__ static int size(int) { return 0; }

  __device__ void add(const float (&z)[8][4], int) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float best = top_[i];
#pragma unroll
      for (int j = 0; j < 8; ++j) best = fmaxf(best, fmaxf(z[j][2 * i], z[j][2 * i + 1]));
      raise(i, best);
      const float base = best == -INFINITY ? 0 : best;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum_[i] += expf(z[j][2 * i] - base) + expf(z[j][2 * i + 1] - base);
      }
    }
  }
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raise(i, Lanes(4).max(top_[i]));
      threshold[i] = top_[i] + logf(Lanes(4).sum(sum_[i]));
    }
  }

 private:
  __device__ void raise(int i, float to) {
    if (to > top_[i]) sum_[i] *= expf(top_[i] - to);
    top_[i] = to;
  }

  float top_[2] = {-INFINITY, -INFINITY};  // of the lane's own entries until finish()
  float sum_[2] = {0, 0};
};

}  // namespace entrain::cuda
