#include "train/train_step.h"

#include <cmath>

#include "kernels/kernels.h"
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
      tape_(memory,
            {.dtype = decoder.dtype(), .training = true, .recompute = config.train.recompute}),
      sums_(comm),
      optimizer_(decoder.params(), config.train.optim),
      gathering_(decoder.device()),
      read_(decoder.read()) {
  const Shape batch{plan_.per_rank, config.data.seq_len};
  const Shape micro_batch{plan_.micro, config.data.seq_len};
  const Device device = decoder.device();
  const auto ids = static_cast<size_t>(batch.numel());
  batch_memory_ = Buffer(2 * ids * sizeof(int32_t), device);
  auto* batch_ids = static_cast<int32_t*>(batch_memory_.data());
  batch_tokens_ = Mirror(Tensor::of(batch_ids, batch, DType::i32, device));
  batch_targets_ = Mirror(Tensor::of(batch_ids + ids, batch, DType::i32, device));
  loss_memory_ = Buffer(sizeof(double), device);
  loss_sum_ = Mirror(Tensor::of(loss_memory_.data(), {1}, DType::f64, device));

  tokens_ = tape_.keep(micro_batch, DType::i32);
  targets_ = tape_.keep(micro_batch, DType::i32);
  const double tokens = static_cast<double>(config.train.global_batch) * config.data.seq_len;
  loss_ = decoder.loss(tape_, tokens_, targets_, 1 / tokens, [this](Tensor grads) {
    if (last_micro_) sums_.add(grads);
  });
  tape_.time_ops(".attention.");
}

void TrainStep::fill(int64_t first, Sampler& sampler) {
  sampler.fill(first + comm_.rank() * plan_.per_rank, batch_tokens_.host(), batch_targets_.host());
  batch_tokens_.start_upload();
  batch_targets_.start_upload();
}

void TrainStep::deal(int64_t micro) {
  const auto part = [&](const Mirror& batch) {
    return batch.tensor().slice(0, micro * plan_.micro, plan_.micro);
  };
  copy(part(batch_tokens_), tokens_);
  copy(part(batch_targets_), targets_);
}

/// Runs work of the GPU as one graph, captured the second time: the first makes what is made once.
void TrainStep::as_graph(gpu::Graph& graph, const std::function<void()>& work) {
  if (tape_.device() == Device::cpu || !warm_) return work();
  if (!graph) graph.capture(work);
  graph.launch();
}

const StepResult& TrainStep::run(int64_t step, int64_t first, Sampler& sampler) {
  fill(first, sampler);
  zero(loss_sum_.tensor());
  for (int64_t micro = 0; micro < plan_.accumulate; ++micro) {
    deal(micro);
    last_micro_ = micro + 1 == plan_.accumulate;
    as_graph(passes_[last_micro_], [&] {
      tape_.forward();
      tape_.backward();
      with_kernels(tape_.device(), [&](auto k) { k.add_sum(loss_, loss_sum_.tensor()); });
      if (last_micro_) sums_.wait();
    });
  }
  result_.lr = learning_rate(config_.train.optim, step, config_.train.steps);
  optimizer_.prepare(step, result_.lr);
  as_graph(update_, [&] { update(); });
  warm_ = true;

  loss_sum_.download();
  double sum = *loss_sum_.host().ptr<double>();
  comm_.sum(&sum, 1);
  result_.loss = sum / (static_cast<double>(config_.train.global_batch) * config_.data.seq_len);
  result_.grad_norm = optimizer_.grad_norm();
  if (!std::isfinite(result_.loss) || !std::isfinite(result_.grad_norm)) {
    diagnose(step, first, sampler, result_.loss);
  }
  collect_read(comm_, read_, result_.read);
  const OpTime attention = tape_.time(".attention.");
  double seconds[] = {
      (attention.forward + attention.backward) * static_cast<double>(plan_.accumulate),
      sums_.waited_seconds() + gathering_.seconds()};
  comm_.sum(seconds, 2);
  result_.attention_seconds = seconds[0] / comm_.size();
  result_.waiting_seconds = seconds[1] / comm_.size();
  return result_;
}

// All ranks have all gradients and values, so that norms and losses are those without shards, to
// the bit. Gathering float32 values adds half of what the sums of gradients move.
void TrainStep::update() {
  optimizer_.update();
  if (!config_.train.shard_optimizer) return;
  gathering_.reset();
  gathering_.start();
  comm_.gather(decoder_.params().shards());
  gathering_.stop();
  decoder_.params().round();
}

void TrainStep::diagnose(int64_t step, int64_t first, Sampler& sampler, double loss) {
  char found[256] = {};
  last_micro_ = false;
  zero(decoder_.params().grads());  // which the step has spoilt
  fill(first, sampler);
  for (int64_t micro = 0; micro < plan_.accumulate && !found[0]; ++micro) {
    deal(micro);
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
