#pragma once
// A run from configuration to the last checkpoint.
#include "dist/comm.h"
#include "train/config.h"
#include "train/console.h"

namespace entrain {

enum class RunEnd : uint8_t { complete, stopped };  // stopped: by a signal, with a checkpoint saved

/// Trains as `config` says, in config.dir: config.yaml, metrics.jsonl, checkpoints/. With resume it
/// goes on from the newest valid checkpoint there, or starts where there is none; without, a folder
/// that has checkpoints is refused. The folder of a run that is complete is left as it is. Throws
/// Error on all ranks together; checkpoints saved so far stay good.
RunEnd train(const RunConfig& config, bool resume, Comm& comm, Listener& listener);

}  // namespace entrain
