#include "train/study_file.h"

#include <algorithm>

#include "core/edit_distance.h"
#include "train/config_keys.h"
#include "train/yaml.h"

namespace entrain {
namespace {

struct Named {
  const char* name;
  const char* help;
};

constexpr Named sections[] = {
    {"study", "dir, protocol and seeds, below"},
    {"base", "what all runs share: the sections of a run"},
    {"dense", "keys of the dense run, in full: train.steps: 400"},
    {"grid", "list of what to compare: each entry sets keys, lists multiply out"},
};

constexpr Named study_keys[] = {
    {"dir", "folder of everything the study writes"},
    {"protocol", "scratch: all from the seed's initial weights; continued: from one dense model"},
    {"seeds", "list of train.seed; each gets the whole grid"},
};

// Keys of a run that follow from the study.
constexpr Named reserved[] = {
    {"run.dir", "the study names its runs' folders"},
    {"train.init_from", "study.protocol says what runs start from"},
    {"train.seed", "give study.seeds"},
    {"data.skip", "study.protocol says where in the data runs start"},
};
// Keys that all runs of a study share.
constexpr Named shared[] = {
    {"run.device", "only base can, for all runs alike"},
};

template <size_t count>
void require_known(const Named (&known)[count], const std::string& name, const std::string& where,
                   const std::string& prefix) {
  const auto distance = [&](const Named& k) { return edit_distance(name, k.name); };
  const Named& nearest = *std::ranges::min_element(known, {}, distance);
  if (nearest.name == name) return;
  refuse("{}: unknown {} {}{}; did you mean {}{}?", where, prefix.empty() ? "section" : "key",
         prefix, excerpt(name), prefix, nearest.name);
}

template <size_t count>
void refuse_keys(const Named (&keys)[count], const std::string& key, const std::string& where) {
  for (const Named& k : keys) {
    if (key == k.name) refuse("{}: a study cannot set {}: {}", where, key, k.help);
  }
}

class Parser {
 public:
  explicit Parser(const std::string& file) { study_.name = file; }

  StudyFile parse(const std::string& yaml) {
    read_sections(yaml);
    read_study();
    read_base();
    if (sections_.contains("dense")) read_dense();
    read_grid();
    return std::move(study_);
  }

 private:
  std::string at(const YAML::Node& node) const { return line_of(study_.name, node); }

  void read_sections(const std::string& yaml) {
    for (const auto& entry : load_document(yaml, study_.name, "study", "study, base and grid")) {
      const std::string name = key_name(study_.name, entry.first);
      require_known(sections, name, at(entry.first), "");
      if (!sections_.emplace(name, entry.second).second) {
        refuse("{}: {} is given twice", at(entry.first), name);
      }
    }
    for (const char* name : {"study", "base", "grid"}) {
      if (!sections_.contains(name)) refuse("{}: missing the section {}", study_.name, name);
    }
  }

  YAML::Node map_of(const char* section) const {
    const YAML::Node node = sections_.at(section);
    if (!node.IsMap()) refuse("{}: {} must be a map, not {}", at(node), section, kind_of(node));
    return node;
  }

  // One value, or those of a list.
  Settings values_of(const std::string& key, const YAML::Node& name, const YAML::Node& node) const {
    Settings values;
    const auto add = [&](const YAML::Node& value) {
      if (!value.IsScalar()) {
        refuse("{}: {} must be a value or a list of values, not {}", at(name), key,
               value.IsNull() ? "nothing" : kind_of(value));
      }
      values.push_back({key, value.Scalar(), at(value)});
    };
    if (node.IsSequence()) {
      for (const YAML::Node& value : node) add(value);
    } else {
      add(node);
    }
    if (values.empty()) refuse("{}: {} is an empty list", at(name), key);
    return values;
  }

  static const Setting& single(const Settings& values) {
    if (values.size() > 1) refuse("{}: {} must be one value", values[1].where, values[1].key);
    return values[0];
  }

  void read_study() {
    std::map<std::string, Settings> given;
    for (const auto& entry : map_of("study")) {
      const std::string name = key_name(study_.name, entry.first), key = "study." + name;
      require_known(study_keys, name, at(entry.first), "study.");
      if (given.contains(name)) refuse("{}: {} is given twice", at(entry.first), key);
      given[name] = values_of(key, entry.first, entry.second);
    }
    for (const Named& key : study_keys) {
      if (given.contains(key.name)) continue;
      refuse("{}: missing study.{}, {}", study_.name, key.name, key.help);
    }
    const Setting &dir = single(given["dir"]), &protocol = single(given["protocol"]);
    if (dir.value.empty()) refuse("{}: study.dir is empty; name a folder", dir.where);
    if (protocol.value != "scratch" && protocol.value != "continued") {
      refuse("{}: study.protocol must be scratch or continued, not '{}'", protocol.where,
             excerpt(protocol.value));
    }
    study_.dir = dir.value, study_.protocol = protocol.value, study_.seeds = given["seeds"];
  }

  void read_base() {
    study_.base.read(map_of("base"), study_.name);
    for (const Named& r : reserved) {
      const std::string where = study_.base.origin(r.name);
      if (!where.empty()) refuse_keys(reserved, r.name, where);
    }
  }

  // Keys of a run, each with its values.
  std::vector<Settings> read_settings(const YAML::Node& map) const {
    RunConfig names;
    const std::vector<Key> keys = keys_of(names);
    std::vector<Settings> settings;
    for (const auto& entry : map) {
      const std::string name = key_name(study_.name, entry.first), where = at(entry.first);
      if (entry.second.IsMap()) {
        refuse("{}: {} must be a key in full with its value, as in train.lr: 1.0e-3", where,
               excerpt(name));
      }
      if (!find_key(keys, name)) {
        refuse("{}: unknown key {}; {}", where, excerpt(name), suggest_key(keys, name));
      }
      refuse_keys(reserved, name, where);
      refuse_keys(shared, name, where);
      for (const Settings& earlier : settings) {
        if (earlier[0].key == name) refuse("{}: {} is given twice", where, name);
      }
      settings.push_back(values_of(name, entry.first, entry.second));
    }
    return settings;
  }

  void read_dense() {
    const YAML::Node map = map_of("dense");
    if (!study_.continued()) {
      refuse("{}: the section dense needs study.protocol continued, not {}", at(map),
             study_.protocol);
    }
    for (const Settings& values : read_settings(map)) {
      const Setting& s = single(values);
      if (s.key == "attention.method" && s.value != "full") {
        refuse("{}: the dense run has attention.method full, not '{}'", s.where, excerpt(s.value));
      }
      study_.dense.push_back(s);
    }
  }

  void read_grid() {
    const YAML::Node grid = sections_.at("grid");
    if (!grid.IsSequence() || grid.size() == 0) {
      refuse("{}: grid must be a list of entries such as - {{attention.method: full}}", at(grid));
    }
    for (const YAML::Node& entry : grid) {
      if (!entry.IsMap()) {
        refuse("{}: an entry of the grid must be a map of keys, not {}", at(entry), kind_of(entry));
      }
      std::vector<Settings> points{{}};
      for (const Settings& values : read_settings(entry)) {
        std::vector<Settings> longer;
        for (const Settings& point : points) {
          for (const Setting& value : values) {
            longer.push_back(point);
            longer.back().push_back(value);
          }
        }
        points = std::move(longer);
      }
      for (Settings& point : points) study_.grid.push_back({std::move(point), at(entry)});
    }
  }

  StudyFile study_;
  std::map<std::string, YAML::Node, std::less<>> sections_;
};

}  // namespace

StudyFile parse_study(const std::string& yaml, const std::string& file) {
  return Parser(file).parse(yaml);
}

std::string describe_study() {
  std::string lines;
  for (const Named& s : sections) lines += fmt::format("  {:<16} {}\n", s.name, s.help);
  for (const Named& k : study_keys) lines += fmt::format("  study.{:<10} {}\n", k.name, k.help);
  return lines;
}

}  // namespace entrain
