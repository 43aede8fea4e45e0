#pragma once
// A study: the runs of a comparison.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/config.h"

namespace entrain {

struct StudyRun {
  std::string name;       // "dash-target_density0.25-seed1", "dense-seed1": its folder's
  RunConfig config;       // complete; run.dir is STUDY.DIR/runs/NAME
  bool dense = false;     // trained for others to continue from, not to be compared
  std::string init_from;  // name of the dense run that it continues; empty: from scratch
  nlohmann::ordered_json varied = nlohmann::ordered_json::object();  // set by the grid, by key
};

struct Study {
  std::string file, yaml;  // its name and text
  std::string dir;
  std::string protocol;        // scratch | continued
  std::vector<StudyRun> runs;  // in the order of training: seed by seed, the dense one first
};

/// The runs that a study file asks for, each one checked. A continued run begins where the dense
/// run ended, in its parameters (train.init_from) and in its data (data.skip). Throws ConfigError
/// as load_config does, and where two runs would have the same name.
Study load_study(const std::string& path);
Study read_study(const std::string& yaml, const std::string& file);

}  // namespace entrain
