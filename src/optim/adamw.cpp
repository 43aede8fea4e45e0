#include "optim/adamw.h"

#include <cmath>

namespace entrain {

Optimizer::Optimizer(Params& params, const OptimConfig& config)
    : params_(params),
      config_(config),
      lr_c1_c2_({3}, DType::f64),
      squares_memory_(sizeof(double), params.values().device),
      squares_(Tensor::of(squares_memory_.data(), {1}, DType::f64, params.values().device)) {
  adamw_ = {.beta1 = config.beta1,
            .beta2 = config.beta2,
            .eps = config.eps,
            .decay = config.weight_decay,
            .clip = config.clip,
            .lr_c1_c2 = lr_c1_c2_.host().ptr<double>()};
}

void Optimizer::prepare(int64_t step, double lr) {
  double* numbers = lr_c1_c2_.host().ptr<double>();
  numbers[0] = lr;
  numbers[1] = 1 - std::pow(config_.beta1, static_cast<double>(step));
  numbers[2] = 1 - std::pow(config_.beta2, static_cast<double>(step));
}

void Optimizer::update() {
  const auto own = [&](const Tensor& flat) { return params_.of_shard(flat); };
  with_kernels(params_.values().device, [&](auto k) {
    k.sum_of_squares(params_.grads(), squares_.tensor());
    k.adamw(own(params_.values()), own(params_.grads()), params_.m(), params_.v(),
            own(params_.decays()), squares_.tensor(), adamw_, own(params_.rounded()));
  });
  clear_others();
}

/// The gradients of other shards, which their ranks use.
void Optimizer::clear_others() {
  const Tensor grads = params_.grads();
  const int index = params_.shard().index;
  const int64_t begin = params_.shard_begin(index), end = params_.shard_begin(index + 1);
  if (begin > 0) zero(grads.slice(0, 0, begin));
  if (end < grads.numel()) zero(grads.slice(0, end, grads.numel() - end));
}

double Optimizer::grad_norm() {
  squares_.download();
  return std::sqrt(*squares_.host().ptr<double>());
}

}  // namespace entrain
