#include "train/evaluate.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>

namespace entrain {

void require_sequence(const TokenStore& store, Split split, int64_t seq_len) {
  require(
      store.tokens(split) > seq_len,
      "{}: the {} split has {} tokens, fewer than one sequence of data.seq_len + 1 = {}; take a "
      "shorter one, or tokenize more",
      store.path(), name_of(split), store.tokens(split), seq_len + 1);
}

namespace {

nlohmann::ordered_json to_json(const HeadRead& read) {
  return {{"density", read.density},
          {"router_density", read.router_density},
          {"active_blocks", read.active_blocks}};
}

std::vector<PositionLoss> by_stretch(const std::vector<double>& sums, int64_t sequences) {
  const auto tokens = std::ssize(sums), stretches = std::min<int64_t>(16, tokens);
  std::vector<PositionLoss> result;
  for (int64_t i = 0; i < stretches; ++i) {
    const int64_t begin = i * tokens / stretches, end = (i + 1) * tokens / stretches;
    const double sum = std::accumulate(sums.begin() + begin, sums.begin() + end, 0.0);
    result.push_back({begin, end, sum / static_cast<double>((end - begin) * sequences)});
  }
  return result;
}

}  // namespace

nlohmann::ordered_json to_json(const EvalResult& result) {
  nlohmann::ordered_json out{{"loss", result.loss},
                             {"perplexity", result.perplexity},
                             {"tokens", result.tokens},
                             {"tokens_per_second", result.tokens_per_second}};
  out.update(to_json(result.read.all));
  for (const std::vector<HeadRead>& layer : result.read.heads) {
    nlohmann::ordered_json heads;
    for (const HeadRead& head : layer) heads.push_back(to_json(head));
    out["layers"].push_back(heads);
  }
  for (const auto& [begin, end, loss] : result.loss_by_position) {
    out["loss_by_position"].push_back({{"begin", begin}, {"end", end}, {"loss", loss}});
  }
  if (result.recall.answers > 0) {
    out["answers"] = result.recall.answers;
    out["recall_accuracy"] = result.recall.accuracy();
  }
  return out;
}

Evaluator::Evaluator(Decoder& decoder, TapeMemory& memory, int64_t seq_len)
    : decoder_(decoder), tape_(memory, {}), position_loss_(static_cast<size_t>(seq_len)) {
  tokens_ = tape_.keep({1, seq_len}, DType::i32);
  targets_ = tape_.keep({1, seq_len}, DType::i32);
  predicted_ = tape_.keep({1, seq_len}, DType::i32);
  loss_ = decoder.loss(tape_, tokens_, targets_, 1, {}, predicted_);
}

EvalResult Evaluator::run(const TokenStore& store, Split split, int64_t sequences, Comm& comm) {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t seq_len = tokens_[1], available = (store.tokens(split) - 1) / seq_len;
  require_sequence(store, split, seq_len);
  sequences = std::min(sequences, available);
  std::vector<int32_t> window(static_cast<size_t>(seq_len + 1));
  collect_read(comm, decoder_.read());  // clears what training counted
  std::ranges::fill(position_loss_, 0.0);
  std::array<double, 2> recall{};  // answers, right
  for (int64_t i = comm.rank(); i < sequences; i += comm.size()) {
    const int64_t first = i * available / sequences * seq_len;
    store.read(split, first, seq_len + 1, window.data());
    std::copy(window.begin(), window.end() - 1, tokens_.ptr<int32_t>());
    std::copy(window.begin() + 1, window.end(), targets_.ptr<int32_t>());
    tape_.forward();
    for (int64_t t = 0; t < seq_len; ++t) {
      position_loss_[static_cast<size_t>(t)] += loss_.ptr<float>()[t];
    }
    for (const int64_t answer : store.answers(split, first + 1, seq_len)) {
      const int64_t t = answer - (first + 1);
      recall[0] += 1;
      recall[1] += predicted_.ptr<int32_t>()[t] == targets_.ptr<int32_t>()[t];
    }
  }
  comm.sum(position_loss_.data(), static_cast<int>(seq_len));
  comm.sum(recall.data(), 2);
  EvalResult result;
  result.tokens = sequences * seq_len;
  result.loss = std::accumulate(position_loss_.begin(), position_loss_.end(), 0.0) /
                static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.loss);
  result.read = collect_read(comm, decoder_.read());
  result.loss_by_position = by_stretch(position_loss_, sequences);
  result.recall = {static_cast<int64_t>(recall[0]), static_cast<int64_t>(recall[1])};
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  result.tokens_per_second = static_cast<double>(result.tokens) / seconds.count();
  return result;
}

}  // namespace entrain
