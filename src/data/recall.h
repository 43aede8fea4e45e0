#pragma once
// Key-value recall: synthetic text with answers that only its own past holds. A document is filler
// words, overwritten by statements "\nqk=V\n" and, a given distance after each, by its question
// "\nqk?V\n". Keys qk are two lowercase letters, each stated once a document; values V are
// uppercase letters, all 26 equally likely, so that who does not look back is right once in 26.
// Filler has none of "\n", "=", "?" and uppercase letters, and the same words for every seed, so
// that a model trained on one store can be asked about another. Tokens are bytes.
#include <cstdint>
#include <string>
#include <vector>

namespace entrain {

struct RecallTask {
  int64_t length = 0;  // tokens of a document, its end included
  // Tokens from a statement to its question: one number a document, drawn evenly from these. Where
  // it is always the same, the answer can be copied from its place, without reading the key.
  int64_t min_distance = 0, max_distance = 0;
  int64_t pairs = 0;  // of a document
  uint64_t seed = 1;
};

/// Throws Error naming the bound, in terms of tokenize's options, when no document can be made.
void check(const RecallTask& task);

struct RecallDocument {
  std::string text;              // length - 1 bytes
  std::vector<int64_t> answers;  // where in it the values of the questions are, ascending
};

/// Depends on nothing but its arguments. The task must pass check().
RecallDocument recall_document(const RecallTask& task, uint64_t number);

}  // namespace entrain
