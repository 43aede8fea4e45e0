#include "train/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

namespace entrain {

void require_sequence(const TokenStore& store, Split split, int64_t seq_len) {
  require(
      store.tokens(split) > seq_len,
      "{}: the {} split has {} tokens, fewer than one sequence of data.seq_len + 1 = {}; take a "
      "shorter one, or tokenize more",
      store.path(), name_of(split), store.tokens(split), seq_len + 1);
}

Evaluator::Evaluator(Decoder& decoder, TapeMemory& memory, int64_t seq_len)
    : decoder_(decoder), tape_(memory, {}) {
  tokens_ = tape_.keep({1, seq_len}, DType::i32);
  targets_ = tape_.keep({1, seq_len}, DType::i32);
  loss_ = decoder.loss(tape_, tokens_, targets_, 1);
}

EvalResult Evaluator::run(const TokenStore& store, Split split, int64_t sequences, Comm& comm) {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t seq_len = tokens_[1], available = (store.tokens(split) - 1) / seq_len;
  require_sequence(store, split, seq_len);
  sequences = std::min(sequences, available);
  std::vector<int32_t> window(static_cast<size_t>(seq_len + 1));
  EvalResult result;
  collect_read(comm, decoder_.read(), result.read);  // clears what training counted
  double sum = 0;
  for (int64_t i = comm.rank(); i < sequences; i += comm.size()) {
    store.read(split, i * available / sequences * seq_len, seq_len + 1, window.data());
    std::copy(window.begin(), window.end() - 1, tokens_.ptr<int32_t>());
    std::copy(window.begin() + 1, window.end(), targets_.ptr<int32_t>());
    tape_.forward();
    for (int64_t t = 0; t < seq_len; ++t) sum += loss_.ptr<float>()[t];
  }
  comm.sum(&sum, 1);
  result.tokens = sequences * seq_len;
  result.loss = sum / static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.loss);
  collect_read(comm, decoder_.read(), result.read);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  result.tokens_per_second = static_cast<double>(result.tokens) / seconds.count();
  return result;
}

}  // namespace entrain
