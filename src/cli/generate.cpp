// entrain generate: text that a trained model goes on with.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <optional>
#include <utility>

#include "cli/commands.h"
#include "data/tokenizer.h"
#include "model/generator.h"
#include "model/token_choice.h"
#include "train/device.h"
#include "train/machine.h"
#include "train/trained_model.h"

namespace entrain::cli {
namespace {

struct Options {
  std::string run;
  std::vector<std::string> overrides;
  std::optional<std::string> prompt;
  int64_t tokens = 200;
  double temperature = 0.8, top_p = 0.95;
  uint64_t seed = 1;
  std::string device;
};

/// Seconds since the last call.
class Watch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(now - std::exchange(from_, now)).count();
  }

 private:
  std::chrono::steady_clock::time_point from_ = std::chrono::steady_clock::now();
};

TokenChoice make_choice(const Options& options) {
  try {
    return {options.temperature, options.top_p, options.seed};
  } catch (const Error& error) {
    throw ConfigError(fmt::format("--{}", error.what()));
  }
}

/// Before memory for it is asked for, which may end the program on a machine that overcommits.
void require_memory(const ModelConfig& c, double tokens) {
  const double token = 2.0 * c.n_layer * c.n_kv_head * c.head_dim * sizeof(float);
  const auto memory = static_cast<double>(physical_bytes());
  if (tokens * token < memory) return;
  throw ConfigError(
      fmt::format("--tokens: keys and values of {:.0f} tokens need {:.1f} GiB and this machine has "
                  "{:.1f}: ask for fewer",
                  tokens, tokens * token / (1 << 30), memory / (1 << 30)));
}

std::string read_prompt(const Options& options) {
  if (options.prompt) return *options.prompt;
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  require(!std::cin.bad(), "standard input: {}", std::strerror(errno));
  return text;
}

void put(const std::string& bytes) {
  const bool written = std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size() &&
                       std::fflush(stdout) == 0;
  require(written, "standard output: {}", std::strerror(errno));
}

/// Over all layers and heads.
double sum(Tensor read, ReadField field) {
  double total = 0;
  for (int64_t i = field; i < read.numel(); i += read_fields) total += read.ptr<double>()[i];
  return total;
}

void run(const Options& options) {
  TokenChoice choice = make_choice(options);
  if (options.tokens < 1) throw ConfigError("--tokens must be at least 1");
  const TrainedModel model(find_checkpoint(options.run),
                           with_device(options.overrides, options.device), false);
  const Tokenizer tokenizer(model.store->tokenizer(), model.store->tokenizer_model());
  const int32_t end = tokenizer.end_of_document();
  std::vector<int32_t> prompt = tokenizer.encode(read_prompt(options));
  if (prompt.empty()) prompt = {end};  // a document begins
  require_memory(model.config.model,
                 static_cast<double>(options.tokens) + static_cast<double>(prompt.size()));
  const int64_t capacity = std::ssize(prompt) + options.tokens;
  std::vector<std::string> lacking;
  const std::unique_ptr<Decoder> decoder =
      model.decoder(choose_device(model.config.device), capacity, lacking);
  if (!lacking.empty()) {
    spdlog::warn("not in the checkpoint, untrained: {}", fmt::join(lacking, ", "));
  }
  Generator generator(*decoder, capacity);

  Watch watch;
  Tensor logits = generator.append(prompt);
  const double prompt_seconds = watch.lap();
  int64_t count = 0;
  for (int32_t id = choice.choose(logits); id != end; id = choice.choose(logits)) {
    put(tokenizer.decode({&id, 1}));
    if (++count == options.tokens) break;
    logits = generator.append({&id, 1});
  }
  const double seconds = watch.lap();

  Mirror counters(decoder->read());
  counters.download();
  const Tensor read = counters.host();
  fmt::print(stderr,
             "{}{} tokens{} in {:.2f} s, {:.1f} tokens/s, after {} of the prompt in {:.2f} s; "
             "density {:.4f}, router density {:.4f}\n",
             isatty(STDOUT_FILENO) ? "\n" : "", count,
             count < options.tokens ? " to the end of the document" : "", seconds,
             static_cast<double>(count) / seconds, prompt.size(), prompt_seconds,
             sum(read, read_pairs) / sum(read, read_causal),
             sum(read, read_router) / sum(read, read_causal));
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* generate = app.add_subcommand("generate", "Go on with a text, by a trained model");
  generate
      ->add_option("run", options->run, "run folder (its newest valid checkpoint) or checkpoint")
      ->required();
  generate->add_option("overrides", options->overrides,
                       "section.key=value, in place of what the run was trained with");
  generate->add_option("--prompt", options->prompt,
                       "text to go on with; without it, standard input to its end, as it is; "
                       "empty: a new document");
  generate
      ->add_option("--tokens", options->tokens,
                   "at most so many, fewer where the document ends; text beyond data.seq_len of "
                   "the run, prompt included, is longer than what the model was trained on")
      ->capture_default_str();
  generate
      ->add_option("--temperature", options->temperature,
                   "divides logits: lower is more likely text; 0 takes the likeliest token")
      ->capture_default_str();
  generate
      ->add_option("--top-p", options->top_p,
                   "draw from the fewest likeliest tokens that have this share of the probability")
      ->capture_default_str();
  generate->add_option("--seed", options->seed, "the same seed draws the same text")
      ->capture_default_str();
  add_device(*generate, options->device);
  generate->footer(
      "The text goes to standard output as it is made, without the prompt; speed and the share of\n"
      "the context that was read go to standard error at the end.\n\n"
      "Examples:\n"
      "  entrain generate runs/dash-1m --prompt 'The list of' --tokens 100\n"
      "  entrain generate runs/dash-1m --temperature 0 <chapter.txt");
  generate->callback([options] { run(*options); });
}

}  // namespace entrain::cli
