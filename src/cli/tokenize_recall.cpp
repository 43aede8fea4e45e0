// entrain tokenize --synthetic recall: a store of documents made up on the spot.
#include <charconv>
#include <nlohmann/json.hpp>

#include "cli/progress.h"
#include "cli/tokenize.h"
#include "data/recall.h"
#include "data/tokenizer.h"
#include "train/config.h"

namespace entrain::cli {
namespace {

/// Reads D or LOW:HIGH.
void read_distance(const std::string& text, RecallTask& task) {
  const char* end = text.data() + text.size();
  const auto low = std::from_chars(text.data(), end, task.min_distance);
  task.max_distance = task.min_distance;
  auto last = low;
  if (low.ec == std::errc() && low.ptr != end && *low.ptr == ':')
    last = std::from_chars(low.ptr + 1, end, task.max_distance);
  require(last.ec == std::errc() && last.ptr == end,
          "--distance {}: expected a number of tokens, as in 128, or the least and the most, as in "
          "64:192",
          text);
}

RecallTask read_task(const TokenizeOptions& o) {
  RecallTask task = o.recall;
  task.seed = o.seed;
  try {
    require(o.tokenizer == "bytes",
            "--tokenizer {}: --synthetic recall is a task of bytes; leave --tokenizer out",
            o.tokenizer);
    read_distance(o.distance, task);
    check(task);
  } catch (const Error& error) {
    throw ConfigError(error.what());
  }
  return task;
}

}  // namespace

void tokenize_recall(const TokenizeOptions& o) {
  const RecallTask task = read_task(o);
  const Tokenizer tokenizer;
  SplitOutput output(o, tokenizer.vocab());
  {
    Progress progress("recall", o.documents * task.length);
    for (int64_t i = 0; i < o.documents; progress.update(++i * task.length)) {
      const RecallDocument document = recall_document(task, static_cast<uint64_t>(i));
      std::vector<int32_t> ids = tokenizer.encode(document.text);
      ids.push_back(tokenizer.end_of_document());
      output.add(document.text, ids, document.answers);
    }
  }
  const nlohmann::json provenance = {
      {"created_by", "entrain tokenize"}, {"synthetic", o.synthetic},   {"length", task.length},
      {"distance", o.distance},           {"pairs", task.pairs},        {"documents", o.documents},
      {"tokenizer", tokenizer.name()},    {"validation", o.validation}, {"seed", o.seed}};
  output.finish({tokenizer.name(), tokenizer.model(), provenance.dump(2), ""},
                fmt::format("recall of {} pairs at distance {}", task.pairs, o.distance));
}

}  // namespace entrain::cli
