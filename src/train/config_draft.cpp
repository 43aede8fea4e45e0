#include "train/config_draft.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "train/config_keys.h"
#include "train/yaml.h"

namespace entrain {

void ConfigDraft::read(const YAML::Node& sections, const std::string& file) {
  for (const auto& section : sections) read_section(section.first, section.second, file);
}

void ConfigDraft::read_section(const YAML::Node& key, const YAML::Node& body,
                               const std::string& file) {
  const std::vector<Key> keys = keys_of(config_);
  const std::string name = key_name(file, key), where = line_of(file, key);
  if (find_key(keys, name)) {
    const size_t dot = name.find('.');
    refuse("{}: write {} as {} inside the section {}:", where, name, name.substr(dot + 1),
           name.substr(0, dot));
  }
  const bool known = std::ranges::any_of(keys, [&](const Key& k) { return k.section() == name; });
  if (!known && body.IsMap()) {
    refuse("{}: unknown section {}; {}", where, excerpt(name), suggest_section(keys, name));
  }
  if (!known) refuse("{}: unknown key {}; {}", where, excerpt(name), suggest_key(keys, name));
  record(name, where);
  if (body.IsNull()) return;  // all its keys are commented out
  if (!body.IsMap()) {
    refuse("{}: {} must be a section of keys, not {}", where, name, kind_of(body));
  }
  for (const auto& entry : body) {
    read_key(name + '.' + key_name(file, entry.first), entry.first, entry.second, file);
  }
}

void ConfigDraft::read_key(const std::string& name, const YAML::Node& key, const YAML::Node& value,
                           const std::string& file) {
  const std::string where = line_of(file, key);
  record(name, where);
  if (find_key(keys_of(config_), name) && !value.IsScalar()) {
    if (value.IsNull()) refuse("{}: {} has no value", where, name);
    refuse("{}: {} must be one value, not {}", where, name, kind_of(value));
  }
  set(name, value.IsScalar() ? value.Scalar() : "", where);
}

// yaml-cpp hands out both of two equal keys.
void ConfigDraft::record(const std::string& name, const std::string& where) {
  const auto [first, fresh] = origins_.emplace(name, where);
  if (!fresh) refuse("{}: {} is given twice, first at {}", where, name, first->second);
}

void ConfigDraft::set(const std::string& name, const std::string& value, const std::string& where) {
  const std::vector<Key> keys = keys_of(config_);
  const Key* key = find_key(keys, name);
  if (!key) refuse("{}: unknown key {}; {}", where, excerpt(name), suggest_key(keys, name));
  const std::string complaint = assign(key->field, value);
  if (!complaint.empty()) refuse("{}: {} {}, not '{}'", where, name, complaint, excerpt(value));
  origins_[name] = where;
}

std::string ConfigDraft::origin(const std::string& name) const {
  const auto at = origins_.find(name);
  return at == origins_.end() ? "" : at->second;
}

const RunConfig& ConfigDraft::complete(const std::string& file) const {
  RunConfig names;
  std::vector<std::string_view> missing;
  for (const Key& key : keys_of(names)) {
    if (key.required && !origins_.contains(key.name)) missing.push_back(key.name);
  }
  if (!missing.empty()) refuse("{}: missing {}", file, fmt::join(missing, ", "));
  return config_;
}

const RunConfig& ConfigDraft::checked(const std::string& file) const {
  complete(file);
  try {
    check(config_);
  } catch (const ConfigError& error) {
    const std::string where = origin(error.key);
    refuse("{}: {}", where.empty() ? file : where, error.what());
  }
  return config_;
}

}  // namespace entrain
