#pragma once
// What earlier calls left in a study's folder.
#include "dist/comm.h"
#include "train/study.h"

namespace entrain {

/// Throws ConfigError unless all that lies in the folders of the study's runs comes from the same
/// configurations: names the run, the key, both values and what to do. Keys that change no result
/// may differ (checkpoint.*, train.log_every, and where the study's folder lies).
void require_agreement(const Study& study);

/// Throws unless these runs can start: ConfigError where the ranks cannot share a batch, the device
/// or type is not to be had, or the tokens are others than those of runs that are done; Error where
/// the tokens are missing or too few. What only the start of a run can tell (memory, damage) is
/// left to it.
void require_startable(const Study& study, const std::vector<size_t>& runs, Comm& comm);

}  // namespace entrain
