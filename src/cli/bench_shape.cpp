// --shape of `entrain bench`.
#include <algorithm>
#include <charconv>
#include <map>
#include <sstream>

#include "cli/bench.h"
#include "train/config.h"

namespace entrain::cli {
namespace {

/// "B1,Hq32" as names and numbers; 0 for what is no number.
std::map<std::string, int64_t> sizes_in(const std::string& text) {
  std::map<std::string, int64_t> sizes;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t digits = std::min(item.find_first_of("0123456789"), item.size());
    const char* end = item.data() + item.size();
    int64_t size = 0;
    if (std::from_chars(item.data() + digits, end, size).ptr != end) size = 0;
    if (!sizes.emplace(item.substr(0, digits), size).second) return {};  // twice
  }
  return sizes;
}

}  // namespace

AttentionSizes parse_shape(const std::string& text, const std::string& form) {
  constexpr int64_t most = 1 << 30;
  const std::map<std::string, int64_t> given = sizes_in(text), wanted = sizes_in(form);
  AttentionSizes s{.Hq = 0, .Hkv = 0, .D = 0};
  for (auto [name, size] :
       {std::pair{"B", &s.B}, {"Hq", &s.Hq}, {"Hkv", &s.Hkv}, {"D", &s.D}, {"N", &s.N}}) {
    const auto found = given.find(name);
    const bool fits = found != given.end() && found->second > 0 && found->second <= most;
    if (fits != wanted.contains(name) || given.size() != wanted.size()) {
      throw ConfigError(fmt::format("--shape {}: {} is the form", text, form));
    }
    if (fits) *size = found->second;
  }
  if (s.Hq % s.Hkv != 0) {
    throw ConfigError(fmt::format("--shape {}: Hq must be a multiple of Hkv", text));
  }
  return s;
}

}  // namespace entrain::cli
