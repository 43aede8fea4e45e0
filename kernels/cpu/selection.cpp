// InfLLM-V2's choice of blocks (arXiv 2509.24663): softmax over pooled windows of keys, summed over
// the group's heads, gives each block the score of the best window that overlaps it; forced blocks
// and the best-scored are attended. No gradient passes through the choice.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/score_tile.h"

namespace entrain {
namespace {

/// A tile's scores against windows, and what becomes of them query by query.
struct WindowTile : ScoreTile {
  void reserve(const AttentionShape& s, int64_t windows, int64_t blocks) {
    ScoreTile::reserve(s, windows);
    grow(weights, windows);
    grow(scores, blocks);
    ranked.reserve(static_cast<size_t>(blocks));
  }

  /// weights [visible]: each head's softmax over the visible windows, summed over the heads.
  void weigh(int64_t g, int64_t query, int64_t visible) {
    std::fill_n(weights.begin(), visible, 0.0);
    for (int64_t h = 0; h < g; ++h) {
      double* p = z.data() + (query * g + h) * step;
      double top = -INFINITY;
#pragma omp simd reduction(max : top)
      for (int64_t m = 0; m < visible; ++m) top = std::max(top, p[m]);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t m = 0; m < visible; ++m) sum += p[m] = fast_exp(p[m] - top);
      const double inverse = 1 / sum;
      for (int64_t m = 0; m < visible; ++m) weights[m] += p[m] * inverse;
    }
  }

  /// scores [blocks]: the largest weight of the visible windows that overlap a block, or 0. A NaN
  /// weight counts as 0, so that the choice is always made among numbers.
  void score(const BlockSelection& selection, int64_t blocks, int64_t visible) {
    for (int64_t c = 0; c < blocks; ++c) {
      const int64_t begin = c * selection.block, end = begin + selection.block;
      const int64_t before = begin - selection.length;  // windows that start here or earlier end
                                                        // before the block
      int64_t m = before < 0 ? 0 : before / selection.stride + 1;
      double best = 0;
      for (; m < visible && m * selection.stride < end; ++m) best = std::max(best, weights[m]);
      scores[c] = best;
    }
  }

  /// Sets the bits of the chosen blocks among those up to `own`, the query's block.
  void choose(const BlockSelection& selection, int64_t own, uint64_t* mask) {
    int64_t left = selection.topk;
    auto take = [&](int64_t c) {
      mask[c / 64] |= uint64_t{1} << (c % 64);
      --left;
    };
    const int64_t begin = std::min(selection.init_blocks, own + 1);
    const int64_t end = std::max(begin, own + 1 - selection.local_blocks);
    for (int64_t c = 0; c < begin && left > 0; ++c) take(c);
    for (int64_t c = end; c <= own && left > 0; ++c) take(c);
    if (left == 0) return;

    double least = -1;  // the lowest score taken
    int64_t ties = 0;   // blocks of that score taken
    if (end - begin > left) {
      ranked.assign(scores.begin() + begin, scores.begin() + end);
      std::nth_element(ranked.begin(), ranked.begin() + left - 1, ranked.end(), std::greater<>());
      least = ranked[left - 1];
      ties = std::count(ranked.begin(), ranked.begin() + left, least);
    }
    for (int64_t c = begin; c < end; ++c) {
      if (scores[c] > least || (scores[c] == least && ties-- > 0)) take(c);
    }
  }

  std::vector<double> weights, scores, ranked;
};

thread_local WindowTile tile_of_thread;

}  // namespace

template <>
void Kernels<Device::cpu>::pool_windows(Tensor k, const BlockSelection& selection,
                                        Tensor pooled) const {
  by_type(k, [&]<class T>(T) {
    const HeadView<T> kv(k);
    const int64_t B = k[0], H = k[1], D = k[3], W = selection.windows(k[2]);
    const double scale = 1 / static_cast<double>(selection.length);
#pragma omp parallel for collapse(3) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t r = 0; r < H; ++r) {
        for (int64_t m = 0; m < W; ++m) {
          double* mean = pooled.ptr<double>() + ((b * H + r) * W + m) * D;
          const T* keys = kv.at(b, r, m * selection.stride);
          std::fill_n(mean, D, 0.0);
          for (int64_t t = 0; t < selection.length; ++t) {
            for (int64_t d = 0; d < D; ++d) mean[d] += keys[t * kv.token_step + d];
          }
          for (int64_t d = 0; d < D; ++d) mean[d] *= scale;
        }
      }
    }
  });
}

template <>
void Kernels<Device::cpu>::select_blocks(Tensor q, Tensor pooled, const BlockSelection& selection,
                                         Tensor mask, Tensor read) const {
  by_type(q, [&]<class T>(T) {
    const AttentionShape s(q.shape, {q[0], pooled[1], q[2], q[3]});
    const HeadView<T> qv(q);
    const int64_t W = pooled[2], words = mask[3];
    const double scale = 1 / std::sqrt(static_cast<double>(s.D));
#pragma omp parallel
    tile_of_thread.reserve(s, W, (s.N + selection.block - 1) / selection.block);
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int64_t backwards = s.tiles() - 1; backwards >= 0; --backwards) {  // longest rows first
      for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t r = 0; r < s.Hkv; ++r) {
          WindowTile& tile = tile_of_thread;
          const int64_t first = backwards * s.tile(), count = std::min(s.tile(), s.N - first);
          tile.load(qv, pooled.ptr<double>() + (b * s.Hkv + r) * W * s.D,
                    selection.windows(first + count), scale, s, b, r, first, count);
          double entries = 0;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t token = first + i, own = token / selection.block;
            const int64_t visible = selection.windows(token + 1);
            uint64_t* bits = mask.ptr<uint64_t>() + ((b * s.Hkv + r) * s.N + token) * words;
            std::fill_n(bits, words, 0);
            tile.weigh(s.g, i, visible);
            tile.score(selection, own + 1, visible);
            tile.choose(selection, own, bits);
            entries += static_cast<double>(visible);
          }
          if (read) {
#pragma omp atomic
            read.ptr<double>()[r * read_fields + read_router] += entries;
          }
        }
      }
    }
  });
}

}  // namespace entrain
