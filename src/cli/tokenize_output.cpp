// Where the documents of `entrain tokenize` go: dealt to the splits, written and counted.
#include <fmt/format.h>

#include "cli/tokenize.h"
#include "core/error.h"
#include "core/rng.h"
#include "data/token_format.h"

namespace entrain::cli {

SplitOutput::SplitOutput(const TokenizeOptions& options, int vocab)
    : options_(options), vocab_(vocab), writer_(options.out, vocab) {}

void SplitOutput::add(const std::string& text, std::span<const int32_t> ids,
                      std::span<const int64_t> answers) {
  const uint32_t hash = checksum(0, text.data(), text.size());
  const bool held_out = Rng(hash, options_.seed).uniform() < options_.validation;
  const Split split = held_out ? Split::validation : Split::train;
  writer_.add(split, ids, answers);
  Count& count = counts_[static_cast<size_t>(split)];
  count.documents += 1;
  count.tokens += std::ssize(ids);
  count.bytes += std::ssize(text);
  count.answers += std::ssize(answers);
}

void SplitOutput::finish(const TokenWriter::Description& description, std::string_view what) {
  const auto& [train, validation] = counts_;
  require(train.documents > 0,
          "every document fell into validation; lower --validation or change --seed");
  writer_.finish(description);
  const double bytes = static_cast<double>(train.bytes + validation.bytes);
  fmt::print("{}: {} ids, {:.2f} bytes a token, {}", options_.out, vocab_,
             bytes / static_cast<double>(train.tokens + validation.tokens), what);
  for (Split split : {Split::train, Split::validation}) {
    const Count& count = counts_[static_cast<size_t>(split)];
    fmt::print("\n  {:<10} {:>9} documents {:>12} tokens {:>12} bytes", name_of(split),
               count.documents, count.tokens, count.bytes);
    if (count.answers > 0) fmt::print(" {:>9} answers", count.answers);
  }
  fmt::print("\n");
  if (validation.tokens == 0 && options_.validation > 0)
    fmt::print(stderr,
               "warning: no document fell into validation; give more of them or raise "
               "--validation\n");
}

}  // namespace entrain::cli
