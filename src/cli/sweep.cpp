// entrain sweep: all runs of a study, and their results in one file.
#include "train/sweep.h"

#include "cli/commands.h"
#include "train/device.h"
#include "train/signals.h"
#include "train/study_file.h"
#include "train/together.h"

namespace entrain::cli {
namespace {

void run(const std::string& path) {
  install_signal_handlers();
  std::unique_ptr<Comm> comm = make_comm();
  Study study;
  together(*comm, [&] { study = load_study(path); });
  together(*comm, [&] { require_same(*comm, "study", study.yaml); });
  comm = place_ranks(study.runs.front().config.device, std::move(comm));
  const RunEnd end = sweep(study, *comm, stdout);
  comm.reset();
  if (end == RunEnd::stopped) throw CLI::RuntimeError(stopped);
}

}  // namespace

void add_sweep(CLI::App& app) {
  auto path = std::make_shared<std::string>();
  CLI::App* sweep = app.add_subcommand(
      "sweep", "Train, evaluate and compare the runs of a study; the same command goes on");
  sweep->add_option("study", *path, "YAML file of the study")->required();
  sweep->footer(
      "Examples:\n"
      "  entrain sweep experiments/pareto/study.yaml\n"
      "  mpirun -np 2 entrain sweep experiments/pareto/study.yaml\n\n"
      "A study file:\n"
      "  study: {dir: runs/mine, protocol: continued, seeds: [1, 2]}\n"
      "  base:\n"
      "    model: {n_layer: 4, d_model: 128, n_head: 4, n_kv_head: 2, head_dim: 32, d_ff: 352}\n"
      "    attention: {chunk: 16, block: 16}\n"
      "    data: {path: tokens.h5, seq_len: 1024}\n"
      "    train: {steps: 100, global_batch: 8, micro_batch: 4, lr: 1.0e-3}\n"
      "  dense: {train.steps: 400, train.lr: 4.0e-3}\n"
      "  grid:\n"
      "    - {attention.method: full}\n"
      "    - {attention.method: dash, attention.target_density: [0.25, 0.125]}\n"
      "    - {attention.method: infllmv2, attention.topk: [16, 8]}\n\n" +
      describe_study() +
      "\nFrom scratch, all runs of a seed have the same initial weights and tokens. Continued, a\n"
      "dense model (full attention) is trained once for each seed; each run takes its parameters,\n"
      "starts where it stopped reading, and sees the same tokens as the others. run.dir,\n"
      "train.seed, train.init_from and data.skip follow from that. Keys of base, dense and grid\n"
      "are those of a run: entrain train --help.\n\n"
      "Runs go to STUDY.DIR/runs/NAME, each with a result.json when it is done. results.h5 and\n"
      "results.csv are brought up to date after each. Stopped, killed or failed, the same command\n"
      "does what is missing.\n");
  sweep->callback([path] { run(*path); });
}

}  // namespace entrain::cli
