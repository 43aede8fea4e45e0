#pragma once
// The evaluation of what a run has learned, from its checkpoint.
#include <string>
#include <vector>

#include "dist/comm.h"
#include "train/checkpoint.h"
#include "train/config.h"
#include "train/evaluate.h"

namespace entrain {

struct RunEvaluation {
  std::string checkpoint;
  RunConfig config;  // overrides applied
  CheckpointInfo info;
  std::vector<std::string> lacking;  // parameters that another attention has and the checkpoint not
  EvalResult result;
};

/// Evaluates a checkpoint, or a run folder's newest valid one, on the validation split, with
/// overrides "section.key=value" in place of what it was trained with. Another attention takes the
/// parameters that it shares with the checkpoint's. Throws Error.
RunEvaluation evaluate_run(const std::string& run, const std::vector<std::string>& overrides,
                           Comm& comm);

}  // namespace entrain
