#pragma once
// Loss, density and recall of a model on held-out tokens.
#include <nlohmann/json.hpp>
#include <vector>

#include "core/mirror.h"
#include "core/tape.h"
#include "data/token_store.h"
#include "dist/comm.h"
#include "model/decoder.h"
#include "train/read_report.h"

namespace entrain {

/// Mean loss of the tokens at positions [begin, end) of their sequences.
struct PositionLoss {
  int64_t begin, end;
  double loss;
};

/// Answers of the token store among the evaluated tokens, and how many of them were the most likely
/// token where they stand.
struct Recall {
  int64_t answers = 0, right = 0;
  double accuracy() const { return static_cast<double>(right) / static_cast<double>(answers); }
};

/// How a router spread over its candidates at positions [begin, end): means over queries.
struct PositionRouting {
  int64_t begin, end;
  double candidates;       // chunks to choose from
  double entropy;          // nats, of the routing weights
  double softmax_entropy;  // nats, of a softmax on the same scores
};

struct EvalResult {
  double loss = 0;  // nats a token
  double perplexity = 0;
  int64_t tokens = 0;
  double tokens_per_second = 0;
  ReadReport read;
  std::vector<PositionLoss> loss_by_position;  // 16 stretches of a sequence, or its tokens if fewer
  std::vector<PositionRouting> routing;        // those of them that have candidates
  double routing_entropy = 0;                  // over all queries that have candidates
  Recall recall;                               // no answers where the store marks none
};

/// Its fields by name; `layers` holds density, router_density and active_blocks per kv head,
/// answers and recall_accuracy are absent without answers.
nlohmann::ordered_json to_json(const EvalResult& result);

/// Throws Error unless the split has a sequence of seq_len tokens and their targets.
void require_sequence(const TokenStore& store, Split split, int64_t seq_len);

class Evaluator {
 public:
  /// Records a forward pass of one sequence on `memory`.
  Evaluator(Decoder& decoder, TapeMemory& memory, int64_t seq_len);

  /// `sequences` of a split, spread evenly over it and shared by the ranks; fewer where it is
  /// shorter. Throws Error when it is shorter than one. Gamma stays as it is.
  EvalResult run(const TokenStore& store, Split split, int64_t sequences, Comm& comm);

 private:
  Tape tape_;
  Mirror tokens_, targets_, loss_, predicted_, read_, entropy_;
  std::vector<double> position_loss_;  // sums over sequences, [seq_len]
};

}  // namespace entrain
