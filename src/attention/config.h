#pragma once
// The `attention:` section of a run. The papers: DashAttention arXiv 2605.18753,
// NSA arXiv 2502.11089, InfLLM-V2 arXiv 2509.24663.
#include <string>

namespace entrain {

struct AttentionConfig {
  std::string method = "full";  // full | dash | nsa | infllmv2
  int chunk = 64;               // tokens in a key-value chunk
  double alpha = 1.5;           // entmax: 1 softmax .. 2 sparsemax
  double gamma = 1.0;           // scale of the routing scores: larger is sparser
  double sigma = 1.0e6;         // temperature of the prior: larger tilts the token softmax less
  double prior_eps = 0.0;       // added to routing weights before the logarithm
  bool center = true;           // subtract the mean log weight of the support
  int init_blocks = 0;          // first chunks that every query attends
  int local_blocks = 1;         // last chunks up to the own one that every query attends
  int block = 64;               // nsa, infllmv2: tokens in a block
  int topk = 16;                // nsa, infllmv2: blocks of a query, forced ones included
  int l = 32;                   // nsa, infllmv2: tokens in a window of compressed or pooled keys
  int d = 16;                   // nsa, infllmv2: tokens from one window to the next
  int window = 512;             // nsa: last tokens that every query attends
  std::string compression = "mlp";  // nsa: mlp | linear | mean, of a window's keys and values
  double target_density = 0.0;      // > 0: a controller drives gamma during training to reach it

  // dash: schedules that run linearly from a start over some first steps, 0: as above throughout
  double alpha_start = 1.0;
  int alpha_steps = 0;
  double gamma_start = 1.0;
  int gamma_steps = 0;

  // dash: ablations of what the method is made of
  std::string summaries = "learned";   // learned | mean, of a chunk's keys
  std::string aggregation = "entmax";  // entmax | softmax, of heads before their mean
  bool router_gradient = true;         // false: the token softmax does not train the router

  bool operator==(const AttentionConfig&) const = default;
};

}  // namespace entrain
