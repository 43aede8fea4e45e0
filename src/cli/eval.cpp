// entrain eval: loss of a checkpoint on the validation split.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/commands.h"
#include "train/device.h"
#include "train/evaluate_run.h"

namespace entrain::cli {
namespace {

struct Options {
  std::string run;
  std::vector<std::string> overrides;
  bool json = false;
  std::string device;
};

void print_json(const RunEvaluation& evaluation) {
  nlohmann::ordered_json out{{"method", evaluation.config.attention.method},
                             {"step", evaluation.info.state.step}};
  out.update(to_json(evaluation.result));
  fmt::print("{}\n", out.dump());
}

void print_text(const RunEvaluation& evaluation) {
  const RunConfig& config = evaluation.config;
  const EvalResult& result = evaluation.result;
  const HeadRead& all = result.read.all;
  fmt::print("{}: attention {}, {} validation tokens in {}\n", evaluation.checkpoint,
             config.attention.method, result.tokens, config.data.path);
  if (!evaluation.lacking.empty()) {
    fmt::print("  not in the checkpoint, untrained: {}\n", fmt::join(evaluation.lacking, ", "));
  }
  fmt::print("  loss            {:.4f} nats a token\n  perplexity      {:.3f}\n", result.loss,
             result.perplexity);
  if (result.recall.answers > 0) {
    fmt::print("  recall accuracy {:.4f} of {} answers\n", result.recall.accuracy(),
               result.recall.answers);
  }
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
  std::unique_ptr<Comm> comm = make_comm();
  const TrainedModel model =
      open_run(options.run, with_device(options.overrides, options.device), *comm);
  comm = place_ranks(model.config.device, std::move(comm));
  const RunEvaluation evaluation = evaluate_run(model, *comm);
  if (comm->rank() != 0) return;
  options.json ? print_json(evaluation) : print_text(evaluation);
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
  add_device(*eval, options->device);
  eval->add_flag("--json", options->json, "one JSON object instead of text");
  eval->footer(
      "Examples:\n"
      "  entrain eval runs/dash-1m eval.sequences=200\n"
      "  entrain eval runs/dash-1m attention.method=full");
  eval->callback([options] { run(*options); });
}

}  // namespace entrain::cli
