#include "optim/adamw.h"

#include <cmath>

#include "kernels/kernels.h"

namespace entrain {

double grad_norm(const Params& params) {
  return std::sqrt(Kernels<Device::cpu>{}.sum_of_squares(params.grads()));
}

void adamw_step(Params& params, const OptimConfig& config, int64_t step, double lr, double norm) {
  const double scale = config.clip > 0 && norm > config.clip ? config.clip / norm : 1;
  const double c1 = 1 - std::pow(config.beta1, static_cast<double>(step));
  const double c2 = 1 - std::pow(config.beta2, static_cast<double>(step));
  const Kernels<Device::cpu> k;
  k.adamw(params.values(), params.grads(), params.m(), params.v(), params.decays(), scale, lr,
          config.beta1, config.beta2, c1, c2, config.eps, config.weight_decay);
}

}  // namespace entrain
