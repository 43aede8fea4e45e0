#include "train/train_step.h"

#include <cmath>

#include "kernels/kernels.h"
#include "optim/adamw.h"
#include "optim/schedule.h"
#include "train/together.h"

namespace entrain {

BatchPlan::BatchPlan(const TrainConfig& config, int ranks) {
  if (config.global_batch % ranks != 0) {
    throw ConfigError(
        fmt::format("train.global_batch is {}, which {} ranks cannot share evenly; take {} or {}, "
                    "or another number "
                    "of ranks",
                    config.global_batch, ranks, std::max(1, config.global_batch / ranks) * ranks,
                    (config.global_batch / ranks + 1) * ranks));
  }
  per_rank = config.global_batch / ranks;
  micro = std::min<int64_t>(config.micro_batch, per_rank);
  while (per_rank % micro != 0) --micro;
  accumulate = per_rank / micro;
}

TrainStep::TrainStep(const RunConfig& config, Decoder& decoder, TapeMemory& memory, Comm& comm)
    : config_(config),
      decoder_(decoder),
      comm_(comm),
      plan_(config.train, comm.size()),
      tape_(memory, {.training = true, .recompute = config.train.recompute}) {
  const Shape batch{plan_.micro, config.data.seq_len};
  tokens_ = tape_.keep(batch, DType::i32);
  targets_ = tape_.keep(batch, DType::i32);
  const double tokens = static_cast<double>(config.train.global_batch) * config.data.seq_len;
  loss_ = decoder.loss(tape_, tokens_, targets_, 1 / tokens, [this](Tensor grads) {
    if (last_micro_) comm_.start_sum(grads);
  });
}

void TrainStep::fill(int64_t first, int64_t micro, Sampler& sampler) {
  sampler.fill(first + comm_.rank() * plan_.per_rank + micro * plan_.micro, tokens_, targets_);
}

const StepResult& TrainStep::run(int64_t step, int64_t first, Sampler& sampler) {
  double sum = 0;
  tape_.clear_times();
  for (int64_t micro = 0; micro < plan_.accumulate; ++micro) {
    fill(first, micro, sampler);
    last_micro_ = micro + 1 == plan_.accumulate;
    tape_.forward();
    for (int64_t i = 0; i < loss_.numel(); ++i) sum += loss_.ptr<float>()[i];
    tape_.backward();
  }
  comm_.wait();
  comm_.sum(&sum, 1);
  result_.loss = sum / (static_cast<double>(config_.train.global_batch) * config_.data.seq_len);
  result_.grad_norm = grad_norm(decoder_.params());
  if (!std::isfinite(result_.loss) || !std::isfinite(result_.grad_norm)) {
    diagnose(step, first, sampler, result_.loss);
  }
  collect_read(comm_, decoder_.read(), result_.read);
  const OpTime attention = tape_.time(".attention.");
  result_.attention_seconds = attention.forward + attention.backward;
  comm_.sum(&result_.attention_seconds, 1);
  result_.attention_seconds /= comm_.size();
  result_.lr = learning_rate(config_.train.optim, step, config_.train.steps);
  adamw_step(decoder_.params(), config_.train.optim, step, result_.lr, result_.grad_norm);
  return result_;
}

void TrainStep::diagnose(int64_t step, int64_t first, Sampler& sampler, double loss) {
  char found[256] = {};
  last_micro_ = false;
  Kernels<Device::cpu>{}.zero(decoder_.params().grads());  // which the step has spoilt
  for (int64_t micro = 0; micro < plan_.accumulate && !found[0]; ++micro) {
    fill(first, micro, sampler);
    tape_.first_non_finite().copy(found, sizeof found - 1);
  }
  double where = found[0] ? comm_.size() - comm_.rank() : 0;  // the lowest rank that found one
  comm_.max(&where, 1);
  if (where > 0) comm_.broadcast(found, sizeof found, comm_.size() - static_cast<int>(where));
  const std::string op =
      where > 0 ? found : "none when run again (an overflow of the sum over ranks)";
  together(comm_, [&] {
    fail(
        "step {}: the loss is {} and not all gradients are finite; the first op with a non-finite "
        "value is "
        "{}. Parameters were not changed and no checkpoint is spoilt: lower train.lr or raise "
        "train.warmup and run again with --resume, which starts anew where there is no checkpoint",
        step, loss, op);
  });
  std::abort();
}

}  // namespace entrain
