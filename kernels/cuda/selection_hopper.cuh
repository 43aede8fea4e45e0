#pragma once
// The choice of blocks on Hopper: its problem, and what becomes of a warpgroup's scores, first of
// rows, then of queries (see selection_hopper.cu).
#include "kernels/cuda/route_hopper.cuh"
#include "kernels/cuda/selection.cuh"

namespace entrain::cuda {

constexpr int tile_windows = 64;

/// Queries that a thread block takes together, and the tiles of windows that some of them see.
struct SelectItem {
  int b, r, first;  // batch, kv head, first query
  int tiles;
};

/// A problem as the kernel takes it.
struct HopperSelect {
  int B, Hkv, g, N;
  int first;    // the token that the first query is
  int queries;  // of a warpgroup
  int blocks;   // up to the last query
  Sight sight;
  BlockSelection selection;
  uint32_t* mask;
  int64_t half_words;  // of a row of the mask
  double* read;

  /// Work for thread blocks of so many warpgroups.
  __host__ __device__ int items(int groups) const {
    return B * Hkv * ((N + groups * queries - 1) / (groups * queries));
  }
  /// Windows complete at a query.
  __device__ int seen(int query) const { return static_cast<int>(sight.end(first + query)); }
  __device__ int tiles(int query) const { return (seen(query) + tile_windows - 1) / tile_windows; }
  /// Those with most windows come first.
  __device__ SelectItem item(int index, int groups) const {
    const int heads = B * Hkv, size = groups * queries, head = index % heads;
    const int at = ((N + size - 1) / size - 1 - index / heads) * size;
    return {head / Hkv, head % Hkv, at, tiles(min(at + size, N) - 1)};
  }
};

/// The softmax of a lane's two rows, in base 2: first over the lane's columns, then over the row.
class RowSoftmax {
 public:
  __device__ explicit RowSoftmax(float factor) : factor_(factor) {}

  __device__ void add(const float (&z)[8][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(z[j][2 * i], z[j][2 * i + 1]));
      const float old = top_[i];
      top_[i] = fmaxf(old, __fmul_rn(top, factor_));
      const float shift = finite(top_[i]);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum += power_of_2(fmaf(z[j][2 * i], factor_, -shift)) +
               power_of_2(fmaf(z[j][2 * i + 1], factor_, -shift));
      }
      total_[i] = total_[i] * power_of_2(old - shift) + sum;
    }
  }
  /// After the last tile.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = finite(Lanes(4).max(top_[i]));
      offset_[i] = shift + log2f(Lanes(4).sum(total_[i] * power_of_2(top_[i] - shift)));
    }
  }
  /// p of z, in its place.
  __device__ void weigh(float (&z)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) z[j][e] = power_of_2(fmaf(z[j][e], factor_, -offset_[e / 2]));
    }
  }

 private:
  const float factor_;
  float top_[2] = {-INFINITY, -INFINITY}, total_[2] = {0, 0};
  float offset_[2];

  /// What to take from scores before their exponentials where so far the largest is this.
  __device__ static float finite(float top) {
    return top == -INFINITY ? 0 : top;
  }
};

/// Scores of blocks for a warp's queries [first, first + count) of its warpgroup; of its query s,
/// lane s remembers how many windows it sees.
class QueryScores {
 public:
  __device__ QueryScores(const HopperSelect& p, float* of_warpgroup, int query, int first,
                         int count)
      : p_(p),
        scores_(of_warpgroup + first * p.blocks),
        lane_(static_cast<int>(threadIdx.x) % 32),
        query_(query + first),
        first_(first),
        count_(count) {
    seen_ = lane_ < count ? p.seen(query_ + lane_) : 0;
    for (int x = lane_; x < count * p.blocks; x += 32) scores_[x] = 0;
    __syncwarp();
  }
  /// Adds a tile of p, whose sums over heads take the place of the queries' first heads.
  __device__ void add(const RowTile& p, int tile) {
    for (int s = 0; s < count_; ++s) {
      float2 sum = make_float2(0, 0);
#pragma unroll 8
      for (int h = 0; h < p_.g; ++h) {
        const float2 x = *pair(p, s, h);
        sum.x += x.x;
        sum.y += x.y;
      }
      *pair(p, s, 0) = sum;
    }
    __syncwarp();
    const int from = tile * tile_windows, to = from + tile_windows;
    const int last = min(BlockWindows::last_block(p_.selection, to - 1), p_.blocks - 1);
    for (int c0 = BlockWindows::first_block(p_.selection, from); c0 <= last; c0 += 32) {
      const int c = c0 + lane_;
      const BlockWindows windows(p_.selection, c);
      for (int s = 0; s < count_; ++s) {
        const int end = min(to, __shfl_sync(0xffffffffu, seen_, s));
        if (c > last) continue;
        float& score = scores_[s * p_.blocks + c];
        score = windows.add<float>(score, p.at((first_ + s) * p_.g, 0), from, end);
      }
    }
    __syncwarp();
  }
  /// Writes the queries' masks.
  __device__ void choose_blocks(const SelectItem& item) const {
    const auto block = static_cast<int>(p_.selection.block);
    const int64_t row = (int64_t{item.b} * p_.Hkv + item.r) * p_.N + query_;
    for (int s = 0; s < count_; ++s) {
      choose(p_.selection, scores_ + s * p_.blocks, (p_.first + query_ + s) / block,
             p_.mask + (row + s) * p_.half_words, p_.half_words);
    }
  }

 private:
  /// The lane's two columns of a head.
  __device__ float2* pair(const RowTile& p, int s, int head) const {
    return reinterpret_cast<float2*>(p.at((first_ + s) * p_.g + head, 2 * lane_));
  }

  const HopperSelect& p_;
  float* const scores_;
  const int lane_, query_, first_, count_;
  int seen_;
};

}  // namespace entrain::cuda
