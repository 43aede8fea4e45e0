#pragma once
// A configuration while it is put together: from the sections of a YAML file, then key by key.
#include <yaml-cpp/yaml.h>

#include <map>
#include <string>

#include "train/config.h"

namespace entrain {

/// Remembers where each key was set ("run.yaml:12", "command line"), so that whatever turns out
/// wrong names the place. Everything throws ConfigError.
class ConfigDraft {
 public:
  /// Reads a map of sections; `file` is its name for errors. A key set before is refused.
  void read(const YAML::Node& sections, const std::string& file);

  /// Sets a key from text, whether it was set before or not.
  void set(const std::string& name, const std::string& value, const std::string& where);

  /// Where a key was set; empty where it was not.
  std::string origin(const std::string& name) const;

  /// As far as it was set.
  const RunConfig& config() const { return config_; }
  /// The same; refuses where a required key is missing, in the name of `file`.
  const RunConfig& complete(const std::string& file) const;
  /// The same after check(), whose refusals then name where the key was set.
  const RunConfig& checked(const std::string& file) const;

 private:
  void read_section(const YAML::Node& key, const YAML::Node& body, const std::string& file);
  void read_key(const std::string& name, const YAML::Node& key, const YAML::Node& value,
                const std::string& file);
  void record(const std::string& name, const std::string& where);

  RunConfig config_;
  std::map<std::string, std::string, std::less<>> origins_;  // of sections too
};

}  // namespace entrain
