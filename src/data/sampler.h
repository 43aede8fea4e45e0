#pragma once
// Which tokens a step trains on: the same for any number of ranks, and restored by one number.
#include <cstdint>
#include <vector>

#include "core/tensor.h"
#include "data/token_store.h"

namespace entrain {

/// Sequences of seq_len + 1 tokens at stride seq_len (the last token of one is the first target's
/// context of the next), in an order shuffled anew each epoch from (seed, epoch).
class Sampler {
 public:
  /// Throws Error when the training split is shorter than one sequence.
  Sampler(const TokenStore& store, int seq_len, uint64_t seed);

  int64_t sequences() const;  // in one epoch

  /// Fills tokens and targets ([batch, seq_len], i32) with sequences number first, first + 1, ...
  /// of the endless stream; targets are the tokens one position on.
  void fill(int64_t first, Tensor tokens, Tensor targets);

 private:
  const TokenStore& store_;
  int64_t seq_len_;
  uint64_t seed_;
  int64_t epoch_ = -1;  // whose order is in order_
  std::vector<uint32_t> order_;
};

}  // namespace entrain
