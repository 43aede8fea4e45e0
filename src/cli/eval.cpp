// entrain eval: loss of a checkpoint on the validation split.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "dist/comm.h"
#include "train/checkpoint.h"
#include "train/config.h"
#include "train/evaluate.h"
#include "train/together.h"

namespace entrain::cli {
namespace {

struct Options {
  std::string run;
  std::vector<std::string> overrides;
  bool json = false;
};

nlohmann::ordered_json to_json(const HeadRead& read) {
  return {{"density", read.density},
          {"router_density", read.router_density},
          {"active_blocks", read.active_blocks}};
}

void print_json(const RunConfig& config, const CheckpointInfo& info, const EvalResult& result) {
  nlohmann::ordered_json out{{"method", config.attention.method},
                             {"step", info.state.step},
                             {"loss", result.loss},
                             {"perplexity", result.perplexity},
                             {"tokens", result.tokens},
                             {"tokens_per_second", result.tokens_per_second}};
  out.update(to_json(result.read.all));
  for (const std::vector<HeadRead>& layer : result.read.heads) {
    nlohmann::ordered_json heads;
    for (const HeadRead& head : layer) heads.push_back(to_json(head));
    out["layers"].push_back(heads);
  }
  fmt::print("{}\n", out.dump());
}

void print_text(const RunConfig& config, const std::string& path, const EvalResult& result) {
  const HeadRead& all = result.read.all;
  fmt::print("{}: attention {}, {} validation tokens in {}\n", path, config.attention.method,
             result.tokens, config.data.path);
  fmt::print("  loss            {:.4f} nats a token\n  perplexity      {:.3f}\n", result.loss,
             result.perplexity);
  fmt::print("  density         {:.4f} (sparsity {:.4f})\n  router density  {:.4f}\n", all.density,
             1 - all.density, all.router_density);
  fmt::print("  density per layer and key-value head:\n");
  for (size_t i = 0; i < result.read.heads.size(); ++i) {
    fmt::print("    layer {:2}", i);
    for (const HeadRead& head : result.read.heads[i]) fmt::print("  {:.4f}", head.density);
    fmt::print("\n");
  }
}

void run(const Options& options) {
  const std::unique_ptr<Comm> comm = make_comm();
  RunConfig config;
  CheckpointInfo info;
  std::string path;
  std::unique_ptr<TokenStore> store;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Evaluator> evaluator;
  TapeMemory memory(Device::cpu);
  together(*comm, [&] {
    if (comm->rank() == 0) path = find_checkpoint(options.run);
  });
  broadcast(*comm, path, 0);
  together(*comm, [&] {
    info = read_info(path);
    config = read_config(info.config_yaml, path, options.overrides);
    store = std::make_unique<TokenStore>(config.data.path);
    require_tokenizer(path, info.data_fingerprint, *store);
    require_sequence(*store, Split::validation, config.data.seq_len);
    config.model.vocab = store->vocab();
    decoder = std::make_unique<Decoder>(config.model, config.attention, config.data.seq_len, 0,
                                        false, Device::cpu);
    load_checkpoint(path, decoder->params());
    // Gamma as training left it, unless the user asks for another.
    const bool given = std::ranges::any_of(
        options.overrides, [](const std::string& o) { return o.starts_with("attention.gamma="); });
    double* gamma = decoder->attention().gamma();
    if (gamma && !given && info.state.controller.contains("gamma")) {
      *gamma = info.state.controller.at("gamma");
    }
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      evaluator = std::make_unique<Evaluator>(*decoder, memory, config.data.seq_len);
    }
  });
  const EvalResult result = evaluator->run(*store, Split::validation, config.eval.sequences, *comm);
  if (comm->rank() != 0) return;
  options.json ? print_json(config, info, result) : print_text(config, path, result);
}

}  // namespace

void add_eval(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* eval =
      app.add_subcommand("eval", "Loss and density of a checkpoint on the validation split");
  eval->add_option("run", options->run, "run folder (its newest valid checkpoint) or checkpoint")
      ->required();
  eval->add_option("overrides", options->overrides,
                   "section.key=value, in place of what the run was trained with");
  eval->add_flag("--json", options->json, "one JSON object instead of text");
  eval->footer("Example: entrain eval runs/quickstart-dash eval.sequences=200");
  eval->callback([options] { run(*options); });
}

}  // namespace entrain::cli
