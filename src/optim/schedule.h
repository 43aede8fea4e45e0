#pragma once
#include <cstdint>

#include "optim/config.h"

namespace entrain {

/// The learning rate of step `step` (from 1) of `steps`: linear warm-up to lr, then down to min_lr
/// by a half cosine or a line, or constant.
double learning_rate(const OptimConfig& config, int64_t step, int64_t steps);

/// A value at step `step` (from 1) that goes linearly from `start` to `end` within the first
/// `steps` steps and stays there; with 0 of them it is `end` throughout.
double ramp(double start, double end, int64_t steps, int64_t step);

}  // namespace entrain
