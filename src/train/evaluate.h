#pragma once
// Loss and density of a model on held-out tokens.
#include "core/tape.h"
#include "data/token_store.h"
#include "dist/comm.h"
#include "model/decoder.h"
#include "train/read_report.h"

namespace entrain {

struct EvalResult {
  double loss = 0;  // nats a token
  double perplexity = 0;
  int64_t tokens = 0;
  double tokens_per_second = 0;
  ReadReport read;
};

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
  Decoder& decoder_;
  Tape tape_;
  Tensor tokens_, targets_, loss_;
};

}  // namespace entrain
