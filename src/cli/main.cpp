// entrain: the program. Finds the subcommand, runs it, and turns every error into one line and an
// exit code.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <new>
#include <vector>

#include "cli/commands.h"
#include "core/edit_distance.h"
#include "core/version.h"
#include "dist/mpi.h"
#include "train/config.h"
#include "train/together.h"

namespace entrain::cli {
namespace {

constexpr const char* footer =
    "Example:\n"
    "  entrain tokenize corpus/ --tokenizer bpe:2048 --out tokens.h5\n"
    "  mpirun -np 2 entrain train configs/dash-1m.yaml data.path=tokens.h5\n"
    "\n"
    "Exit codes:\n"
    "  0  done\n"
    "  1  an error, named on the last line\n"
    "  2  wrong usage or configuration; nothing was started\n"
    "  3  stopped by a signal after saving a checkpoint; continue with --resume\n"
    "     (sweep: with the same command)\n";

int report(const std::string& message, ExitCode code) {
  std::string line = "entrain: " + message;
  std::ranges::replace(line, '\n', ' ');
  std::cerr << line + '\n';  // in one write: mpirun may be speaking too
  return code;
}

// CLI11 would take a mistyped command for a stray argument.
void require_known_command(CLI::App& app, const std::string& name) {
  if (name.starts_with('-')) return;
  const std::vector<CLI::App*> commands = app.get_subcommands(nullptr);
  const auto distance = [&](CLI::App* command) { return edit_distance(name, command->get_name()); };
  CLI::App* nearest = *std::ranges::min_element(commands, {}, distance);
  if (nearest->get_name() == name) return;
  throw ConfigError(fmt::format("unknown command {}; did you mean {}?", name, nearest->get_name()));
}

/// What a command can do with less memory.
std::string with_less_memory(const CLI::App& app) {
  const std::vector<CLI::App*> commands = app.get_subcommands();
  const std::string command = commands.empty() ? "" : commands.front()->get_name();
  if (command == "train") {
    return "; lower train.micro_batch or data.seq_len, or set train.recompute=true";
  }
  if (command == "eval") return "; set a smaller data.seq_len";
  if (command == "tokenize") return "; take fewer --threads, or shorter lines of JSON";
  if (command == "op") return "; take smaller tensors";
  if (command == "bench") return "; lower --batch, --tokens or what --shape names";
  return "";
}

int run(int argc, char** argv) {
  CLI::App app(
      "Trains small language models from scratch to study trainable block-sparse attention.",
      "entrain");
  app.set_version_flag("--version", std::string("entrain ") + code_version());
  app.footer(footer);
  app.require_subcommand(0, 1);
  add_train(app);
  add_eval(app);
  add_generate(app);
  add_sweep(app);
  add_tokenize(app);
  add_op(app);
  add_bench(app);
  add_info(app);

  try {
    if (argc > 1) require_known_command(app, argv[1]);
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) std::cout << app.help();
    return done;
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::RuntimeError& end) {
    return end.get_exit_code();
  } catch (const CLI::ParseError& error) {
    return report(std::string(error.what()) + "; see --help", refused);
  } catch (const ReportedElsewhere& error) {
    return error.refused ? refused : failed;
  } catch (const ConfigError& error) {
    return report(error.what(), refused);
  } catch (const OutOfMemory& error) {
    return report(error.what() + with_less_memory(app), failed);
  } catch (const std::bad_alloc&) {
    return report("out of memory" + with_less_memory(app), failed);
  } catch (const std::exception& error) {
    return report(error.what(), failed);
  }
}

/// The code that a command ends with, unless what it printed is lost.
int checked(int code) {
  const bool flushed = std::fflush(stdout) == 0;  // std::cout writes through it
  if (code != done || (flushed && std::ferror(stdout) == 0)) return code;
  return report("cannot write all of the standard output (disk full?)", failed);
}

}  // namespace
}  // namespace entrain::cli

int main(int argc, char** argv) {
  // Warnings are lines beside the errors, not part of what a command prints.
  spdlog::set_default_logger(spdlog::stderr_logger_mt("entrain"));
  spdlog::set_pattern("entrain: %l: %v");
  const int code = entrain::cli::checked(entrain::cli::run(argc, argv));
  entrain::leave_mpi();
  return code;
}
