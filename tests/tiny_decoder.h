#pragma once
// A decoder of a few hundred parameters and a batch for it.
#include "model/decoder.h"
#include "tests/support.h"

namespace entrain {

struct TinyDecoder {
  static constexpr int vocab = 11;

  explicit TinyDecoder(const std::string& method, DType real = DType::f64, int64_t B = 2,
                       int64_t N = 13, bool tied = false)
      : pool(real),
        decoder({.n_layer = 2,
                 .d_model = 8,
                 .n_head = 4,
                 .n_kv_head = 2,
                 .head_dim = 6,
                 .d_ff = 10,
                 .vocab = vocab,
                 .tie_embeddings = tied},
                {.method = method,
                 .chunk = 3,
                 .gamma = 2,
                 .sigma = 2,
                 .block = 2,
                 .topk = 3,
                 .l = 4,
                 .d = 2,
                 .window = 5},
                N, 1, true, Device::cpu, real),
        tokens(pool.integers({B, N}, vocab)),
        targets(pool.integers({B, N}, vocab)) {
    // Larger than at the start of training: gradients of every size, routing that chooses.
    const Tensor all = decoder.params().values();
    for (int64_t i = 0; i < all.numel(); ++i) put(all, i, get(all, i) + 0.4 * pool.rng().normal());
  }

  /// The mean loss of the batch and its gradient.
  Graph::Build training() {
    return [this](Tape& tape) {
      loss = decoder.loss(tape, tokens, targets, 1 / static_cast<double>(tokens.numel()));
    };
  }
  double mean_loss() const {
    double sum = 0;
    for (int64_t i = 0; i < loss.numel(); ++i) sum += get(loss, i);
    return sum / static_cast<double>(loss.numel());
  }
  std::vector<double> gradient(Graph& graph) {
    fill(decoder.params().grads(), 0);
    graph->forward();
    graph->backward();
    return values(decoder.params().grads());
  }

  Pool pool;
  Decoder decoder;
  Tensor tokens, targets, loss;
};

}  // namespace entrain
