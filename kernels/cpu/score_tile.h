#pragma once
// Scores of queries against compressed keys, as routers take them: in double, because a choice made
// from them must not depend on rounding.
#include <algorithm>
#include <vector>

#include "kernels/cpu/tile.h"
#include "kernels/cpu/views.h"

namespace entrain {

/// One tile of queries of one kv head against its first `width` keys. It belongs to a thread, which
/// reserves its memory once.
struct ScoreTile {
  /// For tiles of a shape against at most `keys` keys.
  void reserve(const AttentionShape& s, int64_t keys) {
    const int64_t rows = s.tile() * s.g, most = (keys + lanes - 1) / lanes * lanes;
    grow(queries, rows * s.D);
    grow(keys_t, most * s.D);
    grow(z, rows * most);
  }

  /// z = scale q . key for the g heads of queries [first, first + count) of kv head r.
  template <class T, class K>
  void load(const HeadView<T>& q, const HeadView<K>& keys, int64_t keys_count, double scale,
            const AttentionShape& s, int64_t b, int64_t r, int64_t first, int64_t count) {
    width = keys_count;
    step = (width + lanes - 1) / lanes * lanes;
    const int64_t rows = count * s.g;
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = q.at(b, r * s.g + i % s.g, first + i / s.g);
      for (int64_t d = 0; d < s.D; ++d) queries[i * s.D + d] = scale * from[d];
    }
    tile::transpose(width, s.D, keys.at(b, r, 0), keys.token_step, keys_t.data(), step);
    for (int64_t d = 0; d < s.D; ++d) {
      std::fill(keys_t.data() + d * step + width, keys_t.data() + (d + 1) * step, 0.0);
    }
    tile::gemm(rows, step, s.D, queries.data(), s.D, int64_t{1}, keys_t.data(), step, z.data(),
               step);
  }

  template <class V>
  static void grow(V& v, int64_t n) {
    if (v.size() < static_cast<size_t>(n)) v.resize(static_cast<size_t>(n));
  }

  static constexpr int64_t lanes = tile::Vector<double>::lanes;

  int64_t width = 0;            // keys
  int64_t step = 0;             // from row to row: whole vectors, those beyond the keys are 0
  std::vector<double> queries;  // [rows, D], times scale; rows are (query, head)
  std::vector<double> keys_t;   // [D, step]
  std::vector<double> z;        // [rows, step]
};

}  // namespace entrain
