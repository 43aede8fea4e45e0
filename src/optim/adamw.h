#pragma once
#include "core/mirror.h"
#include "core/params.h"
#include "kernels/kernels.h"
#include "optim/config.h"

namespace entrain {

/// Clipping and AdamW over all parameters of a model, on their device. Where their moments are
/// sharded, only that shard of the values is updated: ranks have to gather the others (comm.h).
class Optimizer {
 public:
  Optimizer(Params& params, const OptimConfig& config);

  /// Sets what changes from step to step, before update(): the step's number, from 1, and its rate.
  void prepare(int64_t step, double lr);
  /// Clips gradients, updates parameters and moments, clears gradients. Where the norm of the
  /// gradients is not finite, nothing changes. Allocates and waits for nothing: a graph may hold
  /// it.
  void update();
  /// The norm of the gradients before they were clipped, of the last update(); waits for it.
  double grad_norm();

 private:
  void clear_others();

  Params& params_;
  OptimConfig config_;
  AdamW adamw_;
  Pinned lr_c1_c2_;
  Buffer squares_memory_;
  Mirror squares_;
};

}  // namespace entrain
