#include "train/study_folder.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "core/file.h"
#include "core/h5.h"
#include "data/sampler.h"
#include "train/config_keys.h"
#include "train/device.h"
#include "train/result.h"
#include "train/train_step.h"
#include "train/yaml.h"

namespace entrain {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// What a key says about results. Of another run, only its name: the study may have been moved.
std::string essence(const Key& key) {
  if (key.section() == "checkpoint" || key.name == "train.log_every" || key.name == "run.dir") {
    return "";
  }
  const std::string text = text_of(key.field);
  return key.name == "train.init_from" ? fs::path(text).filename().string() : text;
}

[[noreturn]] void refuse_other(const std::string& path, const StudyRun& run, const Study& study,
                               std::string_view key, const std::string& there,
                               const std::string& here) {
  refuse("run {}: {} has {} {}, but {} says {}; choose another study.dir, or remove the folder {}",
         run.name, path, key, there.empty() ? "(none)" : there, study.file,
         here.empty() ? "(none)" : here, run.config.dir);
}

void require_same_config(const std::string& path, const std::string& yaml, const StudyRun& run,
                         const Study& study) {
  RunConfig before = parse_config(yaml, path), now = run.config;
  const std::vector<Key> theirs = keys_of(before), keys = keys_of(now);
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string there = essence(theirs[i]), here = essence(keys[i]);
    if (there != here) refuse_other(path, run, study, keys[i].name, there, here);
  }
}

// results.h5 is rewritten from this study's runs: it must not be of another one.
void require_own_results(const Study& study) {
  const std::string path = study.dir + "/results.h5";
  if (!fs::exists(path)) return;
  std::string protocol;
  std::vector<std::string> there;
  try {
    const h5::File file = h5::File::open(path);
    protocol = file.text("", "protocol");
    there = file.groups("runs");
  } catch (const Error&) {
    return;  // damaged: its runs hold all that it did
  }
  if (protocol != study.protocol) {
    refuse("{} is of protocol {}, but {} says {}; choose another study.dir", path, protocol,
           study.file, study.protocol);
  }
  const bool shares = std::ranges::any_of(study.runs, [&](const StudyRun& run) {
    return std::ranges::find(there, run.name) != there.end();
  });
  if (!shares) {
    refuse("{} is of other runs ({}, ...) than {} asks for; choose another study.dir", path,
           there.empty() ? "none" : there.front(), study.file);
  }
}

}  // namespace

void require_agreement(const Study& study) {
  std::set<std::string> present;
  for (const StudyRun& run : study.runs) {
    const std::string config = run.config.dir + "/config.yaml";
    const std::string result_path = run.config.dir + "/result.json";
    const std::optional<Json> result = read_result(run.config.dir);
    if (result && result->at("protocol") != study.protocol) {
      refuse_other(result_path, run, study, "study.protocol", result->at("protocol"),
                   study.protocol);
    }
    if (result) require_same_config(result_path, result->at("config"), run, study);
    if (fs::exists(config)) {
      require_same_config(config, read_file(config), run, study);
      present.insert(run.name);
    }
    // The dense run was removed to be trained anew: what continued from it is of the old one.
    if (present.contains(run.name) && !run.init_from.empty() && !present.contains(run.init_from)) {
      refuse(
          "run {}: it continued from {}, which is no longer there; remove the folder {} too, or "
          "choose another study.dir",
          run.name, run.init_from, run.config.dir);
    }
  }
  require_own_results(study);
}

void require_startable(const Study& study, const std::vector<size_t>& runs, Comm& comm) {
  std::set<std::pair<std::string, int>> seen;
  for (const size_t i : runs) {
    const RunConfig& config = study.runs[i].config;
    const BatchPlan shared(config.train, comm.size());
    if (comm.rank() != 0) continue;
    choose_dtype(config.dtype, choose_device(config.device));
    if (!seen.emplace(config.data.path, config.data.seq_len).second) continue;
    const TokenStore store(config.data.path, /*verify=*/false);  // each run verifies
    require_sequence(store, Split::validation, config.data.seq_len);
    const Sampler sampler(store, config.data.seq_len, config.train.seed);
    for (const StudyRun& other : study.runs) {
      const std::optional<Json> result = read_result(other.config.dir);
      if (!result || other.config.data.path != config.data.path) continue;
      if (result->at("data_fingerprint") == store.fingerprint()) continue;
      refuse(
          "run {} was trained on other tokens than {} has now; restore them, or choose another "
          "study.dir",
          other.name, config.data.path);
    }
  }
}

}  // namespace entrain
