#pragma once
// One maker a method, each defined in the method's file.
#include "attention/attention.h"

namespace entrain {

std::unique_ptr<AttentionMethod> make_full_attention(const AttentionConfig& config);
std::unique_ptr<AttentionMethod> make_dash_attention(const AttentionConfig& config);
std::unique_ptr<AttentionMethod> make_nsa_attention(const AttentionConfig& config);
std::unique_ptr<AttentionMethod> make_infllmv2_attention(const AttentionConfig& config);

}  // namespace entrain
