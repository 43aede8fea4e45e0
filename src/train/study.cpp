#include "train/study.h"

#include <cctype>
#include <cstring>
#include <map>
#include <optional>

#include "core/file.h"
#include "train/config_keys.h"
#include "train/study_file.h"
#include "train/yaml.h"

namespace entrain {
namespace {

using Json = nlohmann::ordered_json;

Json json_of(const Field& field) {
  return std::visit([](const auto* value) { return Json(*value); }, field);
}

Json varied(RunConfig config, const Settings& settings) {
  const std::vector<Key> keys = keys_of(config);
  Json out = Json::object();
  for (const Setting& s : settings) out[s.key] = json_of(find_key(keys, s.key)->field);
  return out;
}

// Folders and groups of HDF5 bear no slash.
std::string as_file_name(std::string text) {
  for (char& c : text) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && !std::strchr("._+-", c)) c = '_';
  }
  return text;
}

// Of all that an entry sets, so that a name stays when other entries change.
std::string name_of(RunConfig config, const Settings& settings, bool dense) {
  const std::vector<Key> keys = keys_of(config);
  std::string name = dense ? "dense" : config.attention.method;
  for (const Setting& s : settings) {
    if (dense || s.key == "attention.method") continue;
    const Key& key = *find_key(keys, s.key);
    name += fmt::format("-{}{}", key.leaf(), text_of(key.field));
  }
  return as_file_name(fmt::format("{}-seed{}", name, config.train.seed));
}

// What would make parameters or place in the data mean something else.
void require_same_start(const ConfigDraft& draft, const std::string& name, const StudyRun& dense) {
  RunConfig from = dense.config, config = draft.config();
  const std::vector<Key> theirs = keys_of(from), keys = keys_of(config);
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string key(keys[i].name);
    if (keys[i].section() != "model" && key != "data.path" && key != "data.seq_len") continue;
    const std::string was = text_of(theirs[i].field), is = text_of(keys[i].field);
    if (was == is) continue;
    refuse("{}: {} is {} in run {} but {} in {}, which it continues; give all runs the same",
           draft.origin(key), key, is, name, was, dense.name);
  }
}

class Expansion {
 public:
  explicit Expansion(const StudyFile& file) : file_(file) {}

  std::vector<StudyRun> runs() {
    for (const Setting& seed : file_.seeds) add_seed(seed);
    return std::move(runs_);
  }

 private:
  void add_seed(const Setting& seed) {
    std::optional<StudyRun> dense;
    if (file_.continued()) {
      ConfigDraft draft = file_.base;
      draft.set("attention.method", "full", file_.name);
      draft.set("attention.target_density", "0", file_.name);
      dense = make_run(draft, file_.dense, seed, nullptr);
      add(*dense, seed.where);
    }
    for (const StudyFile::Point& point : file_.grid) {
      add(make_run(file_.base, point.settings, seed, dense ? &*dense : nullptr), point.where);
    }
  }

  StudyRun make_run(ConfigDraft draft, const Settings& settings, const Setting& seed,
                    const StudyRun* dense) const {
    draft.set("train.seed", seed.value, seed.where);
    for (const Setting& s : settings) draft.set(s.key, s.value, s.where);
    StudyRun run;
    run.dense = file_.continued() && !dense;
    run.name = name_of(draft.config(), settings, run.dense);
    if (!run.dense) run.varied = varied(draft.config(), settings);
    draft.set("run.dir", fmt::format("{}/runs/{}", file_.dir, run.name), file_.name);
    if (dense) {
      const TrainConfig& before = dense->config.train;
      require_same_start(draft, run.name, *dense);
      run.init_from = dense->name;
      draft.set("train.init_from", dense->config.dir, file_.name);
      draft.set("data.skip", fmt::format("{}", before.steps * before.global_batch), file_.name);
    }
    try {
      run.config = draft.checked(file_.name);
    } catch (const ConfigError& error) {
      refuse("{} (run {})", error.what(), run.name);
    }
    return run;
  }

  void add(StudyRun run, const std::string& where) {
    const auto [same, fresh] = places_.emplace(run.name, where);
    if (!fresh) {
      refuse("{}: a second run named {}, which {} gives already; make them differ, or remove one",
             where, run.name, same->second);
    }
    runs_.push_back(std::move(run));
  }

  const StudyFile& file_;
  std::vector<StudyRun> runs_;
  std::map<std::string, std::string> places_;  // where each name comes from
};

}  // namespace

Study load_study(const std::string& path) {
  try {
    return read_study(read_file(path), path);
  } catch (const ConfigError&) {
    throw;
  } catch (const Error& error) {
    throw ConfigError(error.what());
  }
}

Study read_study(const std::string& yaml, const std::string& file) {
  const StudyFile parsed = parse_study(yaml, file);
  return {file, yaml, parsed.dir, parsed.protocol, Expansion(parsed).runs()};
}

}  // namespace entrain
