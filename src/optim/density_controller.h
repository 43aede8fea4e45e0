#pragma once
// Drives gamma, the scale of the routing scores, so that measured density settles at a target.
#include "core/error.h"

namespace entrain {

/// An integral controller in log space: each step moves log gamma by `rate` times the log ratio of
/// the smoothed density to the target. Density falls as gamma grows, so the loop is stable, and
/// slow enough (some 10 steps) that the model follows.
class DensityController {
 public:
  struct State {
    double gamma;
    double density = -1;  // smoothed; negative before the first measurement
  };

  DensityController(double target, double gamma) : target_(target), state_{.gamma = gamma} {}

  /// After a step that measured `density`; the gamma to use from now on.
  double update(double density);

  const State& state() const { return state_; }
  void restore(const State& state) { state_ = state; }

 private:
  double target_;
  State state_;
};

}  // namespace entrain
