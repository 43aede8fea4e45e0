#pragma once
// A study file as written, before its runs are made from it.
#include <string>
#include <vector>

#include "train/config_draft.h"

namespace entrain {

/// One value for a key of a run, and where the file says so.
struct Setting {
  std::string key, value;
  std::string where;  // "study.yaml:12"
};
using Settings = std::vector<Setting>;

struct StudyFile {
  /// One combination of an entry's values.
  struct Point {
    Settings settings;
    std::string where;  // the entry
  };

  std::string name;  // of the file
  std::string dir;
  std::string protocol;  // scratch | continued
  Settings seeds;
  ConfigDraft base;
  Settings dense;
  std::vector<Point> grid;  // in the file's order, the last key of an entry varying fastest

  bool continued() const { return protocol == "continued"; }
};

/// Throws ConfigError naming file, line and, for unknown keys, the nearest one. What values of a
/// run's keys may be is left to those who set them.
StudyFile parse_study(const std::string& yaml, const std::string& file);

/// The keys of a study file, for --help and the documentation.
std::string describe_study();

}  // namespace entrain
