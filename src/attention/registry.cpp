#include "attention/registry.h"

#include <fmt/ranges.h>

namespace entrain {
namespace {

struct Method {
  const char* name;
  std::unique_ptr<AttentionMethod> (*make)(const AttentionConfig&);
};

constexpr Method methods[] = {
    {"full", make_full_attention},
    {"dash", make_dash_attention},
};

}  // namespace

std::unique_ptr<AttentionMethod> make_attention(const AttentionConfig& config) {
  std::vector<const char*> names;
  for (const Method& method : methods) {
    if (config.method == method.name) return method.make(config);
    names.push_back(method.name);
  }
  fail("unknown attention.method {}; known are {}", config.method, fmt::join(names, ", "));
}

}  // namespace entrain
