#pragma once
// The subcommands of entrain, one file each: NAME.cpp defines add_NAME, which declares the
// command's options and sets the callback that runs it.
#include <CLI/CLI.hpp>

namespace entrain::cli {

void add_train(CLI::App& app);
void add_eval(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_op(CLI::App& app);
void add_bench(CLI::App& app);
void add_info(CLI::App& app);

}  // namespace entrain::cli
