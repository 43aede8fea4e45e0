// entrain train: a run from a YAML file.
#include "cli/commands.h"
#include "dist/comm.h"
#include "train/config.h"
#include "train/device.h"
#include "train/run.h"
#include "train/signals.h"
#include "train/together.h"

namespace entrain::cli {
namespace {

struct Options {
  std::string config;
  std::vector<std::string> overrides;
  bool resume = false;
  std::string device;
};

void run(const Options& options) {
  install_signal_handlers();
  std::unique_ptr<Comm> comm = make_comm();
  RunConfig config;
  together(*comm, [&] {
    config = load_config(options.config, with_device(options.overrides, options.device));
  });
  together(*comm, [&] { require_same(*comm, "configuration", to_yaml(config)); });
  together(*comm, [&] {
    require_same(*comm, "command line", options.resume ? "--resume" : "no --resume");
  });
  comm = place_ranks(config.device, std::move(comm));
  Console console(stdout, config.train.log_every);
  const RunEnd end = train(config, options.resume, *comm, console);
  comm.reset();
  if (end == RunEnd::stopped) throw CLI::RuntimeError(stopped);
}

}  // namespace

void add_train(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* train = app.add_subcommand("train", "Train a model; under mpirun, data parallel");
  train->add_option("config", options->config, "YAML file of the run")->required();
  train->add_option("overrides", options->overrides, "section.key=value, in place of the file's");
  train->add_flag(
      "--resume", options->resume,
      "go on from the newest valid checkpoint in run.dir, or start where there is none");
  add_device(*train, options->device);
  train->footer(
      "Examples:\n"
      "  entrain train configs/cpu-small.yaml train.steps=100 run.dir=runs/first\n"
      "  mpirun -np 2 entrain train configs/dash-1m.yaml --resume\n\n"
      "Keys of the YAML file, and of overrides:\n" +
      describe_keys());
  train->callback([options] { run(*options); });
}

}  // namespace entrain::cli
