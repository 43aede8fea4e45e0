#pragma once
// The training step that `entrain bench train` measures.
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "cli/bench_density.h"
#include "core/gpu.h"
#include "core/stopwatch.h"
#include "core/tape.h"
#include "dist/buckets.h"
#include "model/decoder.h"
#include "optim/adamw.h"

namespace entrain::cli {

struct TrainShape {
  ModelConfig model{.n_layer = 4,
                    .d_model = 256,
                    .n_head = 8,
                    .n_kv_head = 2,
                    .head_dim = 32,
                    .d_ff = 704,
                    .vocab = 2048};
  AttentionConfig attention{.chunk = 32};
  int batch = 4, tokens = 1024;  // sequences of a rank, and of a sequence
  bool recompute = false, shard_optimizer = false;
};

/// One micro-batch of random tokens and its update, as train/train_step.h does them: sums of
/// gradients run beside the backward pass, on the GPU in a graph of all. Its parts can be timed.
class Step {
 public:
  Step(const TrainShape& shape, Comm& comm);

  void run();
  /// From now on run() times its parts, which costs it a little.
  void time_parts();
  /// Of this rank, in the last run().
  std::map<std::string, OpTime> parts() const { return tape_->times(); }
  double update_seconds() const { return update_time_.seconds(); }
  double waited_seconds() const { return sums_.waited_seconds() + gather_time_.seconds(); }

  /// What attention reads in a step of this rank.
  ReadCounters::Read read() {
    return counters_.during([&] { run(); });
  }
  /// The router's, where attention has one that a gamma turns.
  double* gamma() { return decoder_.attention().gamma(); }
  /// Turns gamma until all ranks together read the density.
  void seek_density(double target);

  const Decoder& decoder() const { return decoder_; }
  size_t memory() const { return memory_.peak(); }

 private:
  void record(const TrainShape& shape);
  void draw_tokens();
  void work();

  Comm& comm_;
  Decoder decoder_;
  Optimizer optimizer_;
  TapeMemory memory_;
  Buckets sums_;
  std::unique_ptr<Tape> tape_;
  Tensor tokens_, targets_;
  Stopwatch update_time_, gather_time_;
  ReadCounters counters_;
  std::optional<gpu::Graph> graph_;
  int count_ = 0;
};

}  // namespace entrain::cli
