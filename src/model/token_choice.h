#pragma once
// The next token, drawn from logits.
#include <vector>

#include "core/rng.h"
#include "core/tensor.h"

namespace entrain {

class TokenChoice {
 public:
  /// temperature divides logits; 0 takes the likeliest token. top_p in (0, 1] leaves the fewest
  /// likeliest tokens that have this share of the probability. Throws Error for other values.
  TokenChoice(double temperature, double top_p, uint64_t seed);

  /// One of V tokens from their logits [1, V]; of equal ones the lower id comes first. The same
  /// logits one after the other give the same tokens for the same seed. Throws Error for logits
  /// that are not numbers.
  int32_t choose(Tensor logits);

 private:
  struct Candidate {
    double weight;  // not normalised
    int32_t id;
  };

  double temperature_, top_p_;
  Rng rng_;
  std::vector<Candidate> candidates_;
};

}  // namespace entrain
