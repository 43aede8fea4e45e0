#pragma once
// The one table of configuration keys, and what can be done with a single key. Loading, overriding,
// writing, explaining and correcting all go through it.
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "train/config.h"

namespace entrain {

using Field = std::variant<int*, int64_t*, uint64_t*, double*, bool*, std::string*>;

struct Key {
  std::string_view name;  // "section.key"
  Field field;            // in the configuration that keys_of was given
  std::string_view help;
  bool required = false;

  std::string_view section() const { return name.substr(0, name.find('.')); }
  std::string_view leaf() const { return name.substr(name.find('.') + 1); }
};

/// Every key, pointing into `config`; keys of a section follow each other.
std::vector<Key> keys_of(RunConfig& config);

const Key* find_key(const std::vector<Key>& keys, std::string_view name);

/// How to mend an unknown key: "did you mean train.lr?", or what its section has.
std::string suggest_key(const std::vector<Key>& keys, std::string_view unknown);
/// The same for a section's name.
std::string suggest_section(const std::vector<Key>& keys, std::string_view unknown);

/// Sets a field from text. Returns what it must be where the text is not that ("must be a whole
/// number"), else nothing.
std::string assign(const Field& field, const std::string& text);

/// The text that assign() turns into the same value again, bit for bit.
std::string text_of(const Field& field);

}  // namespace entrain
