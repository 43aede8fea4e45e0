#pragma once
// What reading a YAML file takes: errors that name file and line.
#include <yaml-cpp/yaml.h>

#include <string>

#include "train/config.h"

namespace entrain {

/// Throws ConfigError with a message formatted as by fmt::format.
template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw ConfigError(fmt::format(format, std::forward<Args>(args)...));
}

/// As much of a value as one line of an error bears.
std::string excerpt(const std::string& text);

/// "a map", "a list" or "a value".
const char* kind_of(const YAML::Node& node);

/// "run.yaml:12", where a node of that file begins.
std::string line_of(const std::string& file, const YAML::Node& node);

/// The text of a map's key; refuses what is not a word.
std::string key_name(const std::string& file, const YAML::Node& key);

/// The one document of a YAML text, a map. `what` is the thing each file has one of ("run") and
/// `sections` what it needs, for the errors.
YAML::Node load_document(const std::string& yaml, const std::string& file, const char* what,
                         const char* sections);

}  // namespace entrain
