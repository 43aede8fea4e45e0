// The choice of blocks of InfLLM-V2 (arXiv 2509.24663) and NSA (arXiv 2502.11089): softmax over
// pooled or compressed windows of keys, summed over the group's heads, scores blocks; forced blocks
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
    grow(ranked, blocks);
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

  /// scores [blocks], 0 or more. A NaN counts as 0, so that the choice is always made among
  /// numbers.
  void score(const BlockSelection& selection, int64_t blocks, int64_t visible) {
    for (int64_t c = 0; c < blocks; ++c) {
      scores[c] = selection.score == BlockScore::best ? best(selection, c, visible)
                                                      : sum(selection, c, visible);
    }
  }

  /// The largest weight of the visible windows that overlap block c, or 0.
  double best(const BlockSelection& selection, int64_t c, int64_t visible) const {
    const int64_t begin = c * selection.block, end = begin + selection.block;
    const int64_t before = begin - selection.length;  // windows that start here or earlier end
                                                      // before the block
    int64_t m = before < 0 ? 0 : before / selection.stride + 1;
    double best = 0;
    for (; m < visible && m * selection.stride < end; ++m) best = std::max(best, weights[m]);
    return best;
  }

  /// sum over m < block/stride and n < length/stride of weight (block/stride) c + m - n: with a
  /// block and a window of whole strides, each window counts once for each stride they share.
  double sum(const BlockSelection& selection, int64_t c, int64_t visible) const {
    const int64_t in_block = selection.block / selection.stride;
    const int64_t in_window = selection.length / selection.stride;
    const int64_t begin = in_block * c - in_window + 1;
    const int64_t end = std::min(visible, in_block * (c + 1));
    double sum = 0;
    for (int64_t x = std::max<int64_t>(0, begin); x < end; ++x) {
      const int64_t shared = std::min({x - begin + 1, in_block * (c + 1) - x, in_block, in_window});
      sum += static_cast<double>(shared) * weights[x];
    }
    return sum >= 0 ? sum : 0;
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
      const auto last = std::copy(scores.begin() + begin, scores.begin() + end, ranked.begin());
      std::nth_element(ranked.begin(), ranked.begin() + left - 1, last, std::greater<>());
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

template <class T, class K>
void select(Tensor q, Tensor keys, const BlockSelection& selection, const BlockSet& blocks,
            Tensor read) {
  const AttentionShape s(q.shape, keys.shape, selection.runs(), blocks.first);
  const HeadView<T> qv(q);
  const HeadView<K> kv(keys);
  const int64_t words = blocks.mask[3], end = blocks.first + s.N;
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
#pragma omp parallel
  tile_of_thread.reserve(s, s.keys, (end + selection.block - 1) / selection.block);
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t backwards = s.tiles() - 1; backwards >= 0; --backwards) {  // longest rows first
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t r = 0; r < s.Hkv; ++r) {
        WindowTile& tile = tile_of_thread;
        const int64_t first = backwards * s.tile(), count = std::min(s.tile(), s.N - first);
        tile.load(qv, kv, selection.windows(blocks.first + first + count), scale, s, b, r, first,
                  count);
        double entries = 0;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t token = blocks.first + first + i, own = token / selection.block;
          const int64_t visible = selection.windows(token + 1);
          uint64_t* bits =
              blocks.mask.ptr<uint64_t>() + ((b * s.Hkv + r) * s.N + first + i) * words;
          std::fill_n(bits, words, 0);
          tile.weigh(s.g, i, visible);
          tile.score(selection, own + 1, visible);
          tile.choose(selection, own, bits);
          entries += static_cast<double>(visible);
        }
        if (read) {
          double* fields = read.ptr<double>() + r * read_fields;
#pragma omp atomic
          fields[read_router] += entries;
#pragma omp atomic
          fields[read_flops] += 2 * entries * static_cast<double>(s.g * s.D);  // no way back
        }
      }
    }
  }
}

}  // namespace

template <>
void Kernels<Device::cpu>::select_blocks(Tensor q, Tensor keys, const BlockSelection& selection,
                                         const BlockSet& blocks, Tensor, Tensor read) const {
  by_type(q, [&]<class T>(T) {
    by_type(keys, [&]<class K>(K) { select<T, K>(q, keys, selection, blocks, read); });
  });
}

template <>
int64_t Kernels<Device::cpu>::select_scratch(const Shape&) {
  return 0;
}

template <>
void Kernels<Device::cpu>::read_window(const BlockSet& blocks, int64_t window, Tensor read) const {
  const Tensor& mask = blocks.mask;
  const int64_t B = mask[0], H = mask[1], N = mask[2], words = mask[3];
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < H; ++r) {
    int64_t pairs = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < N; ++i) {
        const uint64_t* bits = mask.ptr<uint64_t>() + ((b * H + r) * N + i) * words;
        const int64_t end = blocks.first + i + 1;
        for (int64_t begin = std::max<int64_t>(0, end - window); begin < end;) {
          const int64_t c = begin / blocks.block, next = std::min(end, (c + 1) * blocks.block);
          if (!(bits[c / 64] >> (c % 64) & 1)) pairs += next - begin;
          begin = next;
        }
      }
    }
    read.ptr<double>()[r * read_fields + read_pairs] += static_cast<double>(pairs);
  }
}

}  // namespace entrain
