#pragma once
// AdamW and its schedule; keys of the `train:` section.
#include <string>

namespace entrain {

struct OptimConfig {
  double lr = 3.0e-4;               // peak
  int warmup = 0;                   // steps of linear rise from 0
  std::string schedule = "cosine";  // cosine | linear | constant, after warm-up, down to min_lr
  double min_lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;  // on matrices, not on norms, summaries or embeddings' biases
  double clip = 1.0;          // largest global gradient norm; 0: none

  bool operator==(const OptimConfig&) const = default;
};

}  // namespace entrain
