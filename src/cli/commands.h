#pragma once
// The subcommands of entrain, one file each: NAME.cpp defines add_NAME, which declares the
// command's options and sets the callback that runs it.
#include <CLI/CLI.hpp>

namespace entrain::cli {

/// What the program's exit code says. A callback that returns is `done`; thrown errors choose
/// `failed` or, for ConfigError, `refused`; `throw CLI::RuntimeError(stopped)` ends with any other.
enum ExitCode : int {
  done = 0,
  failed = 1,
  refused = 2,  // wrong usage or configuration, before any work
  stopped = 3,  // by a signal, after saving a checkpoint
};

/// --device, by default as the run says; the run's overrides with it.
void add_device(CLI::App& app, std::string& device);
std::vector<std::string> with_device(std::vector<std::string> overrides, const std::string& device);

void add_train(CLI::App& app);
void add_eval(CLI::App& app);
void add_generate(CLI::App& app);
void add_sweep(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_op(CLI::App& app);
void add_bench(CLI::App& app);
void add_info(CLI::App& app);

}  // namespace entrain::cli
