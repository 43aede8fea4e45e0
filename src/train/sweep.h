#pragma once
// A study from its file to its results.
#include <cstdio>

#include "dist/comm.h"
#include "train/run.h"
#include "train/study.h"

namespace entrain {

/// Trains and evaluates what is missing of a study, one run after another, going on with what broke
/// off, and brings the results up to date after each. Rank 0 tells `out` how it goes. Where a run
/// fails on all ranks the others go on, but for those that would continue from it, and in the end
/// an Error names it. Before anything starts, throws ConfigError where what is there disagrees with
/// the study. `stopped`: by a signal; the same call goes on.
RunEnd sweep(const Study& study, Comm& comm, std::FILE* out);

}  // namespace entrain
