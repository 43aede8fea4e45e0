#include "train/config.h"

#include <yaml-cpp/yaml.h>

#include "core/file.h"
#include "train/config_draft.h"
#include "train/config_keys.h"
#include "train/yaml.h"

namespace entrain {
namespace {

ConfigDraft read_draft(const std::string& yaml, const std::string& file) {
  ConfigDraft draft;
  draft.read(load_document(yaml, file, "run", "model, data, train and run"), file);
  return draft;
}

}  // namespace

RunConfig load_config(const std::string& path, const std::vector<std::string>& overrides) {
  try {
    return read_config(read_file(path), path, overrides);
  } catch (const ConfigError&) {
    throw;
  } catch (const Error& error) {
    throw ConfigError(error.what());
  }
}

RunConfig parse_config(const std::string& yaml, const std::string& origin) {
  return read_draft(yaml, origin).complete(origin);
}

RunConfig read_config(const std::string& yaml, const std::string& origin,
                      const std::vector<std::string>& overrides) {
  ConfigDraft draft = read_draft(yaml, origin);
  for (const std::string& override : overrides) {
    const size_t equals = override.find('=');
    if (equals == override.npos) {
      refuse("command line: '{}' is not of the form section.key=value", excerpt(override));
    }
    draft.set(override.substr(0, equals), override.substr(equals + 1), "command line");
  }
  return draft.checked(origin);
}

std::string to_yaml(const RunConfig& config) {
  RunConfig copy = config;  // the table points into what may be written
  YAML::Emitter out;
  std::string_view section;
  out << YAML::BeginMap;
  for (const Key& key : keys_of(copy)) {
    if (key.section() != section) {
      if (!section.empty()) out << YAML::EndMap;
      section = key.section();
      out << YAML::Key << std::string(section) << YAML::Value << YAML::BeginMap;
    }
    out << YAML::Key << std::string(key.leaf()) << YAML::Value << text_of(key.field);
  }
  out << YAML::EndMap << YAML::EndMap;
  return std::string(out.c_str()) + '\n';
}

}  // namespace entrain
