#pragma once
// The `model:` section of a run: a Llama-shaped decoder.
#include <cstdint>

namespace entrain {

struct ModelConfig {
  int n_layer = 0;
  int d_model = 0;
  int n_head = 0;     // query heads
  int n_kv_head = 0;  // key-value heads; divides n_head
  int head_dim = 0;   // even
  int d_ff = 0;
  int vocab = 0;  // from the token store, not from the YAML
  double rope_theta = 10000.0;
  double norm_eps = 1e-5;
  bool tie_embeddings = false;

  bool operator==(const ModelConfig&) const = default;
};

}  // namespace entrain
