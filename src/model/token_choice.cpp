#include "model/token_choice.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace entrain {

TokenChoice::TokenChoice(double temperature, double top_p, uint64_t seed)
    : temperature_(temperature), top_p_(top_p), rng_(seed, 0) {
  require(temperature >= 0 && std::isfinite(temperature),
          "temperature is {}; it must be 0 (the likeliest token) or positive", temperature);
  require(top_p > 0 && top_p <= 1, "top-p is {}; it must be above 0 and at most 1", top_p);
}

int32_t TokenChoice::choose(Tensor logits) {
  const int64_t vocab = logits.numel();
  candidates_.clear();
  for (int64_t id = 0; id < vocab; ++id) {
    const double logit =
        logits.dtype == DType::f64 ? logits.ptr<double>()[id] : logits.ptr<float>()[id];
    require(std::isfinite(logit),
            "the model's output is not finite: its parameters are broken; take an earlier "
            "checkpoint");
    candidates_.push_back({logit, static_cast<int32_t>(id)});
  }
  const auto comes_later = [](const Candidate& a, const Candidate& b) {
    return a.weight < b.weight || (a.weight == b.weight && a.id > b.id);
  };
  const Candidate likeliest = *std::ranges::max_element(candidates_, comes_later);
  if (temperature_ == 0) return likeliest.id;

  double total = 0;
  for (Candidate& x : candidates_) {
    total += x.weight = std::exp((x.weight - likeliest.weight) / temperature_);
  }
  auto chosen = candidates_.begin();  // of [chosen, end)
  if (top_p_ < 1) {
    // The likeliest are popped to the back of a heap, best last, until they have their share.
    double kept = 0;
    std::ranges::make_heap(candidates_, comes_later);
    for (chosen = candidates_.end(); chosen != candidates_.begin() && kept < top_p_ * total;) {
      std::pop_heap(candidates_.begin(), chosen, comes_later);
      kept += (--chosen)->weight;
    }
    total = kept;
  }
  const double at = rng_.uniform() * total;
  double passed = 0;
  int32_t id = likeliest.id;
  for (; chosen != candidates_.end() && passed <= at; ++chosen) {
    if (chosen->weight == 0) continue;  // rounding may leave `at` beyond the last that can be
    passed += chosen->weight;
    id = chosen->id;
  }
  return id;
}

}  // namespace entrain
