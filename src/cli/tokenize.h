#pragma once
// What the sources of `entrain tokenize` share: its options and the way of documents into a store.
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/recall.h"
#include "data/token_writer.h"

namespace entrain::cli {

struct TokenizeOptions {
  std::vector<std::string> inputs;
  std::string out, tokenizer = "bytes", provenance, jsonl_field;
  std::string synthetic, distance;  // as on the command line
  RecallTask recall;
  int64_t documents = 0;  // synthetic ones
  double validation = 0.05;
  int threads = 1;
  uint64_t seed = 1;
};

/// Deals documents to the splits and counts them.
class SplitOutput {
 public:
  /// Throws Error when the output cannot be written.
  SplitOutput(const TokenizeOptions& options, int vocab);

  /// Appends a document's ids, its end included. The split depends on nothing but the text and the
  /// seed: it is the same wherever and however often a document occurs.
  void add(const std::string& text, std::span<const int32_t> ids,
           std::span<const int64_t> answers = {});

  int64_t documents() const { return counts_[0].documents + counts_[1].documents; }

  /// Completes the store and says what is in it, after `what` in the first line. Throws Error
  /// without a document to train on.
  void finish(const TokenWriter::Description& description, std::string_view what);

 private:
  struct Count {
    int64_t documents = 0, tokens = 0, bytes = 0, answers = 0;
  };
  const TokenizeOptions& options_;
  int vocab_;
  TokenWriter writer_;
  std::array<Count, 2> counts_;
};

/// The task of --synthetic recall into a store of bytes. Throws ConfigError for an impossible one.
void tokenize_recall(const TokenizeOptions& options);

}  // namespace entrain::cli
