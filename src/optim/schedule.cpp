#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace entrain {

double learning_rate(const OptimConfig& c, int64_t step, int64_t steps) {
  if (step <= c.warmup) return c.lr * static_cast<double>(step) / c.warmup;
  if (c.schedule == "constant") return c.lr;
  const double done =
      std::min(1.0, static_cast<double>(step - c.warmup) /
                        static_cast<double>(std::max<int64_t>(1, steps - c.warmup)));
  if (c.schedule == "linear") return c.lr + (c.min_lr - c.lr) * done;
  require(c.schedule == "cosine", "unknown train.schedule {}; known are cosine, linear, constant",
          c.schedule);
  return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * done));
}

double ramp(double start, double end, int64_t steps, int64_t step) {
  if (step > steps) return end;
  return start + (end - start) * static_cast<double>(step - 1) / static_cast<double>(steps);
}

}  // namespace entrain
