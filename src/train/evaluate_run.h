#pragma once
// The evaluation of what a run has learned, from its checkpoint.
#include <string>
#include <vector>

#include "dist/comm.h"
#include "train/evaluate.h"
#include "train/trained_model.h"

namespace entrain {

struct RunEvaluation {
  std::string checkpoint;
  RunConfig config;  // overrides applied
  CheckpointInfo info;
  std::vector<std::string> lacking;  // parameters that another attention has and the checkpoint not
  EvalResult result;
};

/// Opens a checkpoint, or a run folder's newest valid one, on all ranks, with overrides
/// "section.key=value" in place of what it was trained with. Throws Error.
TrainedModel open_run(const std::string& run, const std::vector<std::string>& overrides,
                      Comm& comm);

/// Evaluates it on the validation split. Another attention takes the parameters that it shares with
/// the checkpoint's. Throws Error.
RunEvaluation evaluate_run(const TrainedModel& model, Comm& comm);

}  // namespace entrain
