#pragma once
// What the parts of `entrain bench` share.
#include <string>

#include "cli/commands.h"
#include "core/tensor.h"

namespace entrain::cli {

/// The GPU's name, or how many threads.
std::string where(Device device);

/// Sizes of attention by the names that the field gives them: B sequences of N tokens, Hq query
/// heads, Hkv key-value heads, D head_dim.
struct AttentionSizes {
  int64_t B = 1, Hq, Hkv, D, N = 0;

  int64_t group() const { return Hq / Hkv; }
  bool operator==(const AttentionSizes&) const = default;
};

/// Reads sizes written as `form` is, "Hq32,Hkv2,D128" or with more of them. Throws ConfigError.
AttentionSizes parse_shape(const std::string& text, const std::string& form);

void add_bench_train(CLI::App& bench);
void add_bench_attention(CLI::App& bench);
void add_bench_decode(CLI::App& bench);

}  // namespace entrain::cli
