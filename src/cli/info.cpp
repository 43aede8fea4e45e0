// entrain info: what a file of ours is, or what this build and machine are.
#include <fmt/format.h>
#include <omp.h>

#include <filesystem>

#include "cli/commands.h"
#include "core/file.h"
#include "core/gpu.h"
#include "core/h5.h"
#include "core/version.h"
#include "data/token_store.h"
#include "train/checkpoint.h"
#include "train/machine.h"

namespace entrain::cli {
namespace {

void show_program() {
  MatmulRate cpu(Device::cpu);
  fmt::print("entrain {}\nthreads {}\n{}: {:.0f} GFLOP/s\n", code_version(), omp_get_max_threads(),
             cpu.name(), cpu.measure() / 1e9);
  if (!gpu::available()) return fmt::print("no GPU: {}\n", gpu::why_unavailable());
  const gpu::Info gpu = gpu::info();
  MatmulRate rate(Device::cuda);
  fmt::print("{}, compute capability {}.{}, {:.1f} GiB, {:.1f} free\n{}: {:.0f} GFLOP/s\n",
             gpu.name, gpu.major, gpu.minor, static_cast<double>(gpu.total_bytes) / (1 << 30),
             static_cast<double>(gpu.free_bytes) / (1 << 30), rate.name(), rate.measure() / 1e9);
}

void show_tokens(const std::string& path) {
  const TokenStore store(path);
  fmt::print("{}: token store, checksums match\n  tokenizer  {}, {} ids\n", path, store.tokenizer(),
             store.vocab());
  for (const Split split : {Split::train, Split::validation}) {
    fmt::print("  {:<10} {} tokens in {} documents", name_of(split), store.tokens(split),
               store.documents(split));
    if (store.answers(split) > 0) fmt::print(", {} answers", store.answers(split));
    fmt::print("\n");
  }
  fmt::print("  from       {}\n", store.provenance());
}

void show_checkpoint(const std::string& path) {
  verify_checkpoint(path);
  const CheckpointInfo info = read_info(path);
  int64_t numel = 0;
  for (const auto& p : info.parameters) numel += p.shape.numel();
  fmt::print("{}: checkpoint, checksums match\n", path);
  fmt::print("  step {}, {} sequences, {} rank{}, entrain {}\n", info.state.step,
             info.state.sequences, info.ranks, info.ranks > 1 ? "s" : "", info.code_version);
  for (const auto& [name, value] : info.state.controller) fmt::print("  {} {:.6g}\n", name, value);
  fmt::print("  {} parameters in {} tensors:\n", numel, info.parameters.size());
  for (const auto& p : info.parameters) fmt::print("    {} {}\n", p.name, p.shape.to_string());
  fmt::print("configuration:\n{}", info.config_yaml);
}

void show(const std::string& path) {
  if (path.empty()) return show_program();
  if (std::filesystem::is_directory(path)) return show_checkpoint(find_checkpoint(path));
  const bool checkpoint = h5::File::open(path).has("parameters");
  checkpoint ? show_checkpoint(path) : show_tokens(path);
}

}  // namespace

void add_info(CLI::App& app) {
  auto path = std::make_shared<std::string>();
  CLI::App* info =
      app.add_subcommand("info", "Describe and verify a token store, checkpoint or run");
  info->add_option("path", *path, "file or run folder; without it, this build and machine");
  info->footer("Example: entrain info runs/dash-1m");
  info->callback([path] { show(*path); });
}

}  // namespace entrain::cli
