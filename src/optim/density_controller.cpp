#include "optim/density_controller.h"

#include <algorithm>
#include <cmath>

namespace entrain {

double DensityController::update(double density) {
  constexpr double rate = 0.1, memory = 0.7;
  constexpr double smallest = 1e-3, largest = 1e6;  // far outside of what routing needs
  state_.density = state_.density < 0 ? density : memory * state_.density + (1 - memory) * density;
  const double moved = state_.gamma * std::exp(rate * std::log(state_.density / target_));
  state_.gamma = std::clamp(moved, smallest, largest);
  return state_.gamma;
}

}  // namespace entrain
