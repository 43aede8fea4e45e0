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
    {"nsa", make_nsa_attention},
    {"infllmv2", make_infllmv2_attention},
};

}  // namespace

std::vector<const char*> attention_methods() {
  std::vector<const char*> names;
  for (const Method& method : methods) names.push_back(method.name);
  return names;
}

std::unique_ptr<AttentionMethod> make_attention(const AttentionConfig& config) {
  for (const Method& method : methods) {
    if (config.method == method.name) return method.make(config);
  }
  fail("unknown attention.method {}; known are {}", config.method,
       fmt::join(attention_methods(), ", "));
}

}  // namespace entrain
