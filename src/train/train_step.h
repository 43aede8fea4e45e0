#pragma once
// One optimizer step: micro-batches forward and backward, gradients summed over ranks while the
// backward pass still runs, clipping, AdamW. Everything is recorded once; a step allocates nothing.
// On the GPU the passes of a micro-batch are one graph, as is the update.
#include "core/gpu.h"
#include "core/mirror.h"
#include "core/tape.h"
#include "data/sampler.h"
#include "dist/buckets.h"
#include "model/decoder.h"
#include "optim/adamw.h"
#include "train/config.h"
#include "train/read_report.h"

namespace entrain {

/// How a global batch is dealt to ranks.
struct BatchPlan {
  int64_t per_rank = 0;    // sequences of a rank
  int64_t micro = 0;       // at once: the largest divisor of per_rank up to train.micro_batch
  int64_t accumulate = 0;  // micro-batches of a step

  /// Throws ConfigError unless the ranks divide the global batch.
  BatchPlan(const TrainConfig& config, int ranks);
};

struct StepResult {
  double loss = 0;       // nats a token, over the global batch
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double attention_seconds = 0;  // forward and backward, mean of the ranks
  double waiting_seconds = 0;    // for other ranks' gradients and parameters, mean of the ranks
  ReadReport read;
};

class TrainStep {
 public:
  /// Records the step on `memory` (twice: once to count, once after commit).
  TrainStep(const RunConfig& config, Decoder& decoder, TapeMemory& memory, Comm& comm);

  /// Step number `step` (from 1) on the sampler's sequences from number `first` on. Throws Error
  /// naming the step and the first op with a non-finite value when loss or gradients are not
  /// finite; parameters are then as before the step. The result is valid until the next step.
  const StepResult& run(int64_t step, int64_t first, Sampler& sampler);

 private:
  void fill(int64_t first, Sampler& sampler);
  void deal(int64_t micro);
  void as_graph(gpu::Graph& graph, const std::function<void()>& work);
  void update();
  [[noreturn]] void diagnose(int64_t step, int64_t first, Sampler& sampler, double loss);

  const RunConfig& config_;
  Decoder& decoder_;
  Comm& comm_;
  BatchPlan plan_;
  Tape tape_;
  Buckets sums_;  // of gradients, over ranks
  Optimizer optimizer_;
  Stopwatch gathering_;  // of parameters
  Buffer batch_memory_, loss_memory_;
  Mirror batch_tokens_, batch_targets_;  // of the rank: [per_rank, seq_len]
  Tensor tokens_, targets_, loss_;       // of a micro-batch
  Mirror loss_sum_, read_;
  StepResult result_;
  bool last_micro_ = false;        // gradients are final when the backward pass leaves them
  bool warm_ = false;              // a step has run
  gpu::Graph passes_[2], update_;  // passes of a micro-batch: not the last, the last
};

}  // namespace entrain
