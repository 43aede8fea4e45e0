#pragma once
// Text to train on.
#include <iterator>
#include <string>
#include <vector>

#include "core/rng.h"
#include "data/token_writer.h"
#include "data/tokenizer.h"

namespace entrain {

/// A token store of bytes: sentences of few words, so that there is something to learn.
inline void write_store(const std::string& path, uint64_t seed = 1, int documents = 40) {
  const char* words[] = {"sparse ", "attention ", "reads ", "what ", "it ", "needs", ".\n"};
  const Tokenizer tokenizer;
  TokenWriter writer(path, tokenizer.vocab());
  Rng rng(seed, 0);
  for (int d = 0; d < documents; ++d) {
    std::string text;
    for (int i = 0; i < 100; ++i) text += words[rng.below(std::size(words))];
    std::vector<int32_t> ids = tokenizer.encode(text);
    ids.push_back(tokenizer.end_of_document());
    writer.add(d % 5 ? Split::train : Split::validation, ids);
  }
  writer.finish({tokenizer.name(), "", R"({"files": 1})", ""});
}

}  // namespace entrain
