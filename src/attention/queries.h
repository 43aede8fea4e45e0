#pragma once
// Where a tape's queries are in their sequence. Training runs whole sequences; decoding goes on
// with a few tokens at a time, against caches of what earlier ones left.
#include "kernels/kernels.h"

namespace entrain {

struct Queries {
  int64_t count;
  const int64_t* first = nullptr;  // the token that the first is, read when the tape runs; null: 0

  bool decoding() const { return first != nullptr; }
  int64_t begin() const { return first ? *first : 0; }
  int64_t end() const { return begin() + count; }

  /// Of keys [B, H, rows, D] that stand for runs of tokens, those complete at the last query.
  Tensor seen(Tensor keys, Runs runs = {}) const { return keys.slice(2, 0, runs.within(end())); }
  /// The set as these queries attend it.
  BlockSet attend(BlockSet blocks) const {
    blocks.first = begin();
    return blocks;
  }

  /// Runs [begin, begin + count) that the queries complete, and their tokens' rows of x.
  struct Completed {
    int64_t begin, count;
    Tensor tokens;
  };
  Completed complete(Tensor x, Runs runs) const {
    const int64_t from = runs.within(begin()), number = runs.within(end()) - from;
    if (number == 0) return {from, 0, x.slice(2, 0, 0)};
    return {from, number, x.slice(2, from * runs.stride, runs.end(number - 1) + 1)};
  }
};

}  // namespace entrain
