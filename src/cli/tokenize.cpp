// entrain tokenize: text to a token store.
#include "cli/tokenize.h"

#include <omp.h>

#include <charconv>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/progress.h"
#include "core/error.h"
#include "core/file.h"
#include "core/rng.h"
#include "data/corpus.h"
#include "data/tokenizer.h"
#include "train/config.h"

namespace entrain::cli {
namespace {

constexpr size_t sample_segment = 4096;
constexpr size_t sample_segments = 1024;         // 4 MiB: more hardly changes a vocabulary
constexpr size_t batch_bytes = size_t{1} << 20;  // a thread

bool trains(const TokenizeOptions& o) {
  return o.tokenizer.starts_with("bpe:");
}

/// Segments drawn evenly from the whole corpus (reservoir sampling), which is left rewound.
std::vector<std::string> sample(Corpus& corpus, uint64_t seed) {
  Progress progress("sample", corpus.bytes_total());
  std::vector<std::string> kept;
  Rng rng(seed, 0);
  uint64_t seen = 0;
  for (std::string document; corpus.next(document); progress.update(corpus.bytes_read())) {
    for (std::string_view rest = document; !rest.empty();) {
      const std::string_view segment = rest.substr(0, segment_length(rest, sample_segment));
      rest.remove_prefix(segment.size());
      const uint64_t place = seen++ < sample_segments ? kept.size() : rng.below(seen);
      if (place == kept.size() && kept.size() < sample_segments)
        kept.emplace_back(segment);
      else if (place < sample_segments)
        kept[place] = segment;
    }
  }
  corpus.rewind();
  return kept;
}

Tokenizer make_tokenizer(const TokenizeOptions& o, Corpus& corpus) {
  const std::string& name = o.tokenizer;
  if (name == "bytes") return Tokenizer();
  if (trains(o)) {
    int vocab = 0;
    const char* end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + 4, end, vocab);
    require(error == std::errc() && rest == end && vocab > 258,
            "--tokenizer {}: expected a vocabulary above 258, as in bpe:2048", name);
    const auto text = sample(corpus, o.seed);
    require(!text.empty(), "no text in the input: nothing to tokenize");
    fmt::print(stderr, "training {}\n", name);
    return Tokenizer(name, train_bpe(text, vocab));
  }
  const std::string path = name.starts_with("spm:") ? name.substr(4) : name;
  require(std::filesystem::is_regular_file(path),
          "--tokenizer {}: expected bytes, bpe:VOCAB or the path of a SentencePiece model", name);
  return Tokenizer("spm:" + std::filesystem::path(path).filename().string(), read_file(path));
}

/// Encodes batches of documents in parallel and writes them in their order.
void encode(Corpus& corpus, const Tokenizer& tokenizer, const TokenizeOptions& o,
            SplitOutput& output) {
  Progress progress("tokenize", corpus.bytes_total());
  std::vector<std::string> documents;
  std::vector<std::vector<int32_t>> ids;
  for (bool more = true; more; progress.update(corpus.bytes_read())) {
    documents.clear();
    for (size_t bytes = 0; more && bytes < batch_bytes * static_cast<size_t>(o.threads);) {
      std::string document;
      if (!(more = corpus.next(document))) break;
      bytes += document.size();
      documents.push_back(std::move(document));
    }
    ids.resize(documents.size());
#pragma omp parallel for schedule(dynamic) num_threads(o.threads)
    for (size_t d = 0; d < documents.size(); ++d) {
      ids[d].clear();
      tokenizer.encode(documents[d], ids[d]);
      ids[d].push_back(tokenizer.end_of_document());
    }
    for (size_t d = 0; d < documents.size(); ++d) output.add(documents[d], ids[d]);
  }
}

std::string provenance(const TokenizeOptions& o, const Corpus& corpus,
                       const nlohmann::json& source) {
  const nlohmann::json all = {{"created_by", "entrain tokenize"},
                              {"inputs", o.inputs},
                              {"files", corpus.files_read()},
                              {"bytes", corpus.bytes_read()},
                              {"tokenizer", o.tokenizer},
                              {"validation", o.validation},
                              {"seed", o.seed},
                              {"source", source}};
  return all.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

nlohmann::json read_source(const std::string& path) {
  if (path.empty()) return nullptr;
  require(std::filesystem::is_regular_file(path), "--provenance {}: no such file", path);
  auto source = nlohmann::json::parse(read_file(path), nullptr, false);
  require(!source.is_discarded(), "--provenance {}: not JSON", path);
  return source;
}

void tokenize(const TokenizeOptions& o) {
  if (o.inputs.empty())
    throw ConfigError("nothing to tokenize; name inputs, or --synthetic recall");
  const nlohmann::json source = read_source(o.provenance);
  { const TokenWriter trial(o.out, 1); }  // refuses an unwritable output before the work, not after
  Corpus corpus(o.inputs, {o.jsonl_field, trains(o)});
  const Tokenizer tokenizer = make_tokenizer(o, corpus);
  SplitOutput output(o, tokenizer.vocab());
  encode(corpus, tokenizer, o, output);
  require(output.documents() > 0, "no text in the input: nothing to tokenize");
  std::string files = fmt::format("{} files", corpus.files_read());
  if (corpus.binaries_skipped() > 0)
    files += fmt::format(" ({} binary ones skipped)", corpus.binaries_skipped());
  output.finish(
      {tokenizer.name(), tokenizer.model(), provenance(o, corpus, source), corpus.manifest()},
      files);
}

CLI::Option* add_synthetic(CLI::App& command, TokenizeOptions& o) {
  CLI::Option* synthetic =
      command
          .add_option("--synthetic", o.synthetic,
                      "recall, in place of inputs: documents of filler that state pairs of a key "
                      "and a value and ask for each value later; `entrain eval` then also reports "
                      "how many it predicts")
          ->check(CLI::IsMember({"recall"}));
  const auto add = [&](const char* name, auto& value, const char* what) {
    CLI::Option* option = command.add_option(name, value, what)->needs(synthetic);
    synthetic->needs(option);
    return option;
  };
  add("--length", o.recall.length,
      "Tokens of a synthetic document with its end; data.seq_len, or a divisor of it, keeps "
      "documents whole")
      ->check(CLI::Range(1, 1 << 24));
  add("--distance", o.distance,
      "Tokens from a pair to its question: one number, or the least and the most (64:192) for one "
      "number a document; where it never changes, a model may learn the place instead of the key");
  add("--pairs", o.recall.pairs, "Pairs of a synthetic document");
  add("--documents", o.documents, "Number of synthetic documents")
      ->check(CLI::Range(1, 1000000000));
  return synthetic;
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto options = std::make_shared<TokenizeOptions>();
  TokenizeOptions& o = *options;
  o.threads = omp_get_max_threads();
  CLI::App* command = app.add_subcommand("tokenize", "Turn text into a token store");
  CLI::Option* input = command->add_option(
      "input", o.inputs,
      "Files, folders (without hidden and binary files), globs, or - for standard input; *.jsonl "
      "holds a document a line, other files are one document a MiB");
  command->add_option("--out", o.out, "Token store to write (HDF5)")->required();
  command
      ->add_option("--tokenizer", o.tokenizer,
                   "bytes, bpe:VOCAB (trained on a sample), or the path of a SentencePiece model")
      ->capture_default_str();
  command
      ->add_option("--validation", o.validation,
                   "Share of documents held out, chosen by a hash of their contents")
      ->check(CLI::Range(0.0, 0.99))
      ->capture_default_str();
  CLI::Option* source = command->add_option(
      "--provenance", o.provenance,
      "JSON file on the corpus (version, checksum, licence) to keep in the store");
  CLI::Option* field =
      command->add_option("--jsonl-field", o.jsonl_field,
                          "Read every input as JSON lines and take this field (*.jsonl: text)");
  command
      ->add_option("--threads", o.threads, "Threads that encode; the result does not depend on it")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--seed", o.seed, "Of the sample, the split and synthetic documents")
      ->capture_default_str();
  add_synthetic(*command, o)->excludes(input)->excludes(source)->excludes(field);
  command->footer(
      "Example:\n"
      "  entrain tokenize docs/ notes.txt --out tokens.h5 --tokenizer bpe:2048 --validation 0.05\n"
      "  entrain tokenize --synthetic recall --length 256 --distance 64:192 --pairs 8 "
      "--documents 20000 --out recall.h5");
  command->callback(
      [options] { options->synthetic.empty() ? tokenize(*options) : tokenize_recall(*options); });
}

}  // namespace entrain::cli
