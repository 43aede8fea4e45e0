#include "train/config.h"

#include <fmt/ranges.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <map>

#include "core/file.h"
#include "train/config_keys.h"

namespace entrain {
namespace {

template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw ConfigError(fmt::format(format, std::forward<Args>(args)...));
}

// Where each key was set: "run.yaml:12", "command line".
using Origins = std::map<std::string, std::string, std::less<>>;

// As much of a value as one line of an error bears.
std::string excerpt(const std::string& text) {
  constexpr size_t longest = 40;
  const size_t end = std::min(text.find('\n'), longest);
  return end < text.size() ? text.substr(0, end) + "..." : text;
}

void set_key(const std::vector<Key>& keys, const std::string& name, const std::string& value,
             const std::string& where) {
  const Key* key = find_key(keys, name);
  if (!key) refuse("{}: unknown key {}; {}", where, excerpt(name), suggest_key(keys, name));
  const std::string complaint = assign(key->field, value);
  if (!complaint.empty()) refuse("{}: {} {}, not '{}'", where, name, complaint, excerpt(value));
}

const char* kind_of(const YAML::Node& node) {
  return node.IsMap() ? "a map" : node.IsSequence() ? "a list" : "a value";
}

/// A YAML text on its way into a configuration.
class Reader {
 public:
  Reader(RunConfig& config, std::string file) : keys_(keys_of(config)), file_(std::move(file)) {}

  Origins read(const std::string& yaml) {
    try {
      read_document(YAML::LoadAll(yaml));
    } catch (const YAML::Exception& error) {
      refuse("{}:{}: not valid YAML: {}", file_, error.mark.line + 1, error.msg);
    }
    return std::move(origins_);
  }

 private:
  std::string at(const YAML::Node& node) const {
    return fmt::format("{}:{}", file_, node.Mark().line + 1);
  }

  std::string name_of(const YAML::Node& key) const {
    if (!key.IsScalar()) refuse("{}: a key must be a word, not {}", at(key), kind_of(key));
    return key.Scalar();
  }

  void read_document(const std::vector<YAML::Node>& documents) {
    if (documents.empty() || documents[0].IsNull()) {
      refuse("{} is empty; it needs the sections model, data, train and run", file_);
    }
    if (documents.size() > 1) {
      refuse("{}: a second YAML document starts; give each run its own file", at(documents[1]));
    }
    if (!documents[0].IsMap()) {
      refuse("{}: must be a map of sections such as model: and train:, not {}", at(documents[0]),
             kind_of(documents[0]));
    }
    for (const auto& section : documents[0]) read_section(section.first, section.second);
  }

  void read_section(const YAML::Node& key, const YAML::Node& body) {
    const std::string name = name_of(key);
    if (find_key(keys_, name)) {
      const size_t dot = name.find('.');
      refuse("{}: write {} as {} inside the section {}:", at(key), name, name.substr(dot + 1),
             name.substr(0, dot));
    }
    const bool known =
        std::ranges::any_of(keys_, [&](const Key& k) { return k.section() == name; });
    if (!known && body.IsMap()) {
      refuse("{}: unknown section {}; {}", at(key), excerpt(name), suggest_section(keys_, name));
    }
    if (!known) {
      refuse("{}: unknown key {}; {}", at(key), excerpt(name), suggest_key(keys_, name));
    }
    record(name, key);
    if (body.IsNull()) return;  // all its keys are commented out
    if (!body.IsMap()) {
      refuse("{}: {} must be a section of keys, not {}", at(key), name, kind_of(body));
    }
    for (const auto& entry : body) {
      read_key(name + '.' + name_of(entry.first), entry.first, entry.second);
    }
  }

  void read_key(const std::string& name, const YAML::Node& key, const YAML::Node& value) {
    record(name, key);
    if (find_key(keys_, name) && !value.IsScalar()) {
      if (value.IsNull()) refuse("{}: {} has no value", at(key), name);
      refuse("{}: {} must be one value, not {}", at(key), name, kind_of(value));
    }
    set_key(keys_, name, value.IsScalar() ? value.Scalar() : "", at(key));
  }

  // yaml-cpp hands out both of two equal keys.
  void record(const std::string& name, const YAML::Node& key) {
    const auto [first, fresh] = origins_.emplace(name, at(key));
    if (!fresh) refuse("{}: {} is given twice, first at {}", at(key), name, first->second);
  }

  std::vector<Key> keys_;
  std::string file_;
  Origins origins_;
};

void apply_overrides(RunConfig& config, const std::vector<std::string>& overrides,
                     Origins& origins) {
  const std::vector<Key> keys = keys_of(config);
  for (const std::string& override : overrides) {
    const size_t equals = override.find('=');
    if (equals == override.npos) {
      refuse("command line: '{}' is not of the form section.key=value", excerpt(override));
    }
    const std::string name = override.substr(0, equals);
    set_key(keys, name, override.substr(equals + 1), "command line");
    origins[name] = "command line";
  }
}

void require_all(RunConfig& config, const Origins& origins, const std::string& file) {
  std::vector<std::string_view> missing;
  for (const Key& key : keys_of(config)) {
    if (key.required && !origins.contains(key.name)) missing.push_back(key.name);
  }
  if (!missing.empty()) refuse("{}: missing {}", file, fmt::join(missing, ", "));
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
  RunConfig config;
  require_all(config, Reader(config, origin).read(yaml), origin);
  return config;
}

RunConfig read_config(const std::string& yaml, const std::string& origin,
                      const std::vector<std::string>& overrides) {
  RunConfig config;
  Origins origins = Reader(config, origin).read(yaml);
  apply_overrides(config, overrides, origins);
  require_all(config, origins, origin);
  try {
    check(config);
  } catch (const ConfigError& error) {
    const auto at = origins.find(error.key);
    refuse("{}: {}", at == origins.end() ? origin : at->second, error.what());
  }
  return config;
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
