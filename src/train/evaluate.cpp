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

constexpr int64_t most_stretches = 16;

/// Calls f(begin, end) for equal stretches of a sequence.
template <class F>
void for_each_stretch(int64_t tokens, F f) {
  const int64_t stretches = std::min(most_stretches, tokens);
  for (int64_t i = 0; i < stretches; ++i) {
    f(i * tokens / stretches, (i + 1) * tokens / stretches);
  }
}

std::vector<PositionLoss> by_stretch(const std::vector<double>& sums, int64_t sequences) {
  std::vector<PositionLoss> result;
  for_each_stretch(std::ssize(sums), [&](int64_t begin, int64_t end) {
    const double sum = std::accumulate(sums.begin() + begin, sums.begin() + end, 0.0);
    result.push_back({begin, end, sum / static_cast<double>((end - begin) * sequences)});
  });
  return result;
}

/// Sums the first `positions` rows of entropy f64 [N, entropy_fields] over ranks, clears it and
/// divides.
void collect_entropy(Comm& comm, Mirror& sums, int64_t positions, EvalResult& result) {
  sums.download();
  const Tensor entropy = sums.host().slice(0, 0, positions);
  double* fields = entropy.ptr<double>();
  comm.sum(fields, static_cast<int>(entropy.numel()));
  double all_queries = 0, all_entropy = 0;
  for_each_stretch(entropy[0], [&](int64_t begin, int64_t end) {
    double sum[entropy_fields] = {};
    for (int64_t i = begin * entropy_fields; i < end * entropy_fields; ++i) {
      sum[i % entropy_fields] += fields[i];
    }
    const double queries = sum[entropy_queries];
    if (queries == 0) return;
    result.routing.push_back({begin, end, sum[entropy_candidates] / queries,
                              sum[entropy_routing] / queries, sum[entropy_softmax] / queries});
    all_queries += queries;
    all_entropy += sum[entropy_routing];
  });
  if (all_queries > 0) result.routing_entropy = all_entropy / all_queries;
  std::fill_n(fields, entropy.numel(), 0.0);
  sums.upload();
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
  for (const auto& [begin, end, candidates, entropy, softmax_entropy] : result.routing) {
    out["routing"].push_back({{"begin", begin},
                              {"end", end},
                              {"candidates", candidates},
                              {"entropy", entropy},
                              {"softmax_entropy", softmax_entropy}});
  }
  if (!result.routing.empty()) out["routing_entropy"] = result.routing_entropy;
  if (result.recall.answers > 0) {
    out["answers"] = result.recall.answers;
    out["recall_accuracy"] = result.recall.accuracy();
  }
  return out;
}

Evaluator::Evaluator(Decoder& decoder, TapeMemory& memory, int64_t seq_len)
    : tape_(memory, {.dtype = decoder.dtype()}),
      read_(decoder.read()),
      entropy_(decoder.entropy()),
      position_loss_(static_cast<size_t>(seq_len)) {
  const auto ids = [&] { return Mirror(tape_.keep({1, seq_len}, DType::i32)); };
  tokens_ = ids(), targets_ = ids(), predicted_ = ids();
  loss_ =
      Mirror(decoder.loss(tape_, tokens_.tensor(), targets_.tensor(), 1, {}, predicted_.tensor()));
}

EvalResult Evaluator::run(const TokenStore& store, Split split, int64_t sequences, Comm& comm) {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t seq_len = tokens_.host()[1], available = (store.tokens(split) - 1) / seq_len;
  require_sequence(store, split, seq_len);
  sequences = std::min(sequences, available);
  std::vector<int32_t> window(static_cast<size_t>(seq_len + 1));
  EvalResult result;
  collect_read(comm, read_, result.read);  // clears what training counted
  std::ranges::fill(position_loss_, 0.0);
  std::array<double, 2> recall{};  // answers, right
  for (int64_t i = comm.rank(); i < sequences; i += comm.size()) {
    const int64_t first = i * available / sequences * seq_len;
    store.read(split, first, seq_len + 1, window.data());
    std::copy(window.begin(), window.end() - 1, tokens_.host().ptr<int32_t>());
    std::copy(window.begin() + 1, window.end(), targets_.host().ptr<int32_t>());
    tokens_.upload();
    targets_.upload();
    tape_.forward();
    predicted_.download();
    loss_.download();
    for (int64_t t = 0; t < seq_len; ++t) {
      position_loss_[static_cast<size_t>(t)] += loss_.host().ptr<float>()[t];
    }
    for (const int64_t answer : store.answers(split, first + 1, seq_len)) {
      const int64_t t = answer - (first + 1);
      recall[0] += 1;
      recall[1] += predicted_.host().ptr<int32_t>()[t] == targets_.host().ptr<int32_t>()[t];
    }
  }
  comm.sum(position_loss_.data(), static_cast<int>(seq_len));
  comm.sum(recall.data(), 2);
  result.tokens = sequences * seq_len;
  result.loss = std::accumulate(position_loss_.begin(), position_loss_.end(), 0.0) /
                static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.loss);
  collect_read(comm, read_, result.read);
  result.loss_by_position = by_stretch(position_loss_, sequences);
  result.recall = {static_cast<int64_t>(recall[0]), static_cast<int64_t>(recall[1])};
  collect_entropy(comm, entropy_, seq_len, result);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  result.tokens_per_second = static_cast<double>(result.tokens) / seconds.count();
  return result;
}

}  // namespace entrain
