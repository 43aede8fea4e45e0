// entrain bench train: the training step next to this machine's own matrix product, measured in the
// same minute; under mpirun, that of all ranks. Medians of repeated runs.
#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "cli/bench.h"
#include "cli/bench_step.h"
#include "core/median.h"
#include "core/version.h"
#include "train/config.h"
#include "train/device.h"
#include "train/machine.h"
#include "train/together.h"

namespace entrain::cli {
namespace {

struct Options {
  TrainShape shape;
  double density = 0;  // 0: gamma stays as given
  int repeats = 7;
  bool json = false;
  std::string device = "auto";
};

/// Of all ranks together.
struct Measured {
  double seconds = 0;          // of a step, of the slowest rank
  double waiting_seconds = 0;  // for other ranks, mean of the ranks
  double flops = 0;            // of a step
  double matmul_rate = 0;      // operations a second
  std::string matmul;          // of which product
  double density = 0;
  double share_of_matmul = 0;
  size_t peak_bytes = 0;  // of the rank that holds most
};

double timed(Step& step) {
  const auto begin = std::chrono::steady_clock::now();
  step.run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Measured measure(Step& step, const TrainShape& shape, int repeats, Comm& comm) {
  Measured all;
  step.run();  // warms up
  const ReadCounters::Read read = step.read();
  double work[] = {
      6.0 * static_cast<double>(shape.batch * step.decoder().products(shape.tokens)) + read.flops,
      read.pairs, read.causal};
  comm.sum(work, 3);
  all.flops = work[0];
  all.density = work[1] / work[2];

  MatmulRate matmul(comm.device());
  std::vector<double> seconds, waiting, rates, share;
  for (int i = 0; i < repeats; ++i) {
    double none = 0;
    comm.sum(&none, 1);  // ranks begin together
    double time = timed(step);
    comm.max(&time, 1);
    double sums[] = {step.waited_seconds(), matmul.measure()};
    comm.sum(sums, 2);
    seconds.push_back(time);
    waiting.push_back(sums[0] / comm.size());
    rates.push_back(sums[1]);
    share.push_back(all.flops / time / rates.back());
  }
  all.seconds = median(seconds);
  all.waiting_seconds = median(waiting);
  all.matmul_rate = median(rates);
  all.matmul = matmul.name();
  all.share_of_matmul = median(share);
  double peak = static_cast<double>(peak_held_bytes(comm.device()));
  comm.max(&peak, 1);
  all.peak_bytes = static_cast<size_t>(peak);
  return all;
}

void print_json(const Step& step, const Measured& m, double tokens, const Comm& comm) {
  nlohmann::ordered_json out{{"ranks", comm.size()},
                             {"tokens_per_second", tokens / m.seconds},
                             {"step_ms", 1e3 * m.seconds},
                             {"waiting_ms", 1e3 * m.waiting_seconds},
                             {"density", m.density},
                             {"tflops", m.flops / m.seconds / 1e12},
                             {"matmul_tflops", m.matmul_rate / 1e12},
                             {"share_of_matmul", m.share_of_matmul},
                             {"peak_memory_bytes", m.peak_bytes},
                             {"commit", code_version()}};
  for (const auto& [name, part] : step.parts()) {
    out["parts"][name] = 1e3 * (part.forward + part.backward);
  }
  out["parts"]["update"] = 1e3 * step.update_seconds();
  if (comm.device() == Device::cuda) {
    out["gpu"] = gpu::info().name;
    out["driver"] = gpu::info().driver;
  }
  fmt::print("{}\n", out.dump());
}

void print_text(const Step& step, const Measured& m, const Options& o, double tokens,
                const Comm& comm) {
  const TrainShape& s = o.shape;
  const auto mib = [](size_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  fmt::print(
      "training step: {} layers, d_model {}, {}/{} heads of {}, d_ff {}, vocabulary {}, {} x {} "
      "tokens, attention {} at density {:.3f}, {}{} {}\n",
      s.model.n_layer, s.model.d_model, s.model.n_head, s.model.n_kv_head, s.model.head_dim,
      s.model.d_ff, s.model.vocab, s.batch * comm.size(), s.tokens, s.attention.method, m.density,
      comm.size() > 1 ? fmt::format("{} ranks, each ", comm.size()) : "", where(comm.device()),
      name_of(step.decoder().dtype()));
  fmt::print("  {:<18}{:>10}{:>10}\n", "part", "forward", "backward");
  for (const auto& [name, part] : step.parts()) {
    fmt::print("  {:<18}{:>7.2f} ms{:>7.2f} ms\n", name, 1e3 * part.forward, 1e3 * part.backward);
  }
  fmt::print("  {:<18}{:>7.2f} ms\n", "update", 1e3 * step.update_seconds());
  fmt::print("  {:<18}{:>7.2f} ms, median of {}; the parts are those of one step more\n", "step",
             1e3 * m.seconds, o.repeats);
  if (comm.size() > 1) {
    fmt::print("  {:<18}{:>7.2f} ms, {:.1f} % of it\n", "waiting for ranks",
               1e3 * m.waiting_seconds, 100 * m.waiting_seconds / m.seconds);
  }
  fmt::print("  {:.0f} tokens/s, {:.3f} TFLOP/s of {:.2f} TFLOP in a step\n", tokens / m.seconds,
             m.flops / m.seconds / 1e12, m.flops / 1e12);
  fmt::print("  {}: {:.3f} TFLOP/s; the step runs at {:.1f} % of it\n", m.matmul,
             m.matmul_rate / 1e12, 100 * m.share_of_matmul);
  fmt::print("  activations and gradients {:.0f} MiB, in all {:.0f} MiB\n", mib(step.memory()),
             mib(m.peak_bytes));
}

void bench_train(const Options& o) {
  const std::unique_ptr<Comm> comm = place_ranks(o.device, make_comm());
  std::optional<Step> step;
  together(*comm, [&] {
    step.emplace(o.shape, *comm);
    if (o.density == 0 || step->gamma()) return;
    throw ConfigError(fmt::format("--density turns the gamma of a router; attention {} has none",
                                  o.shape.attention.method));
  });
  if (o.density > 0) step->seek_density(o.density);
  const Measured m = measure(*step, o.shape, o.repeats, *comm);
  step->time_parts();
  step->run();
  step->run();
  if (comm->rank() > 0) return;
  const double tokens = static_cast<double>(comm->size()) * o.shape.batch * o.shape.tokens;
  o.json ? print_json(*step, m, tokens, *comm) : print_text(*step, m, o, tokens, *comm);
}

}  // namespace

void add_bench_train(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  TrainShape& s = o->shape;
  CLI::App* train = bench.add_subcommand("train", "The training step; under mpirun, of all ranks");
  const auto positive = [&](const char* name, auto& value, const char* help = "") {
    return train->add_option(name, value, help)->capture_default_str()->check(CLI::PositiveNumber);
  };
  positive("--n-layer", s.model.n_layer);
  positive("--d-model", s.model.d_model);
  positive("--n-head", s.model.n_head);
  positive("--n-kv-head", s.model.n_kv_head);
  positive("--head-dim", s.model.head_dim);
  positive("--d-ff", s.model.d_ff);
  positive("--vocab", s.model.vocab);
  positive("--batch", s.batch, "sequences of each rank");
  positive("--tokens", s.tokens, "of a sequence");
  train->add_option("--method", s.attention.method, "attention method")->capture_default_str();
  positive("--chunk", s.attention.chunk);
  CLI::Option* gamma = positive("--gamma", s.attention.gamma);
  train
      ->add_option("--density", o->density,
                   "of DashAttention, reached by gamma before the first step")
      ->check(CLI::Range(0.001, 1.0))
      ->excludes(gamma);
  add_device(*train, o->device);
  train->add_flag("--json", o->json, "one JSON object instead of text");
  train->add_flag("--recompute", s.recompute, "recompute activations per block");
  train->add_flag("--shard-optimizer", s.shard_optimizer,
                  "each rank keeps its part of AdamW's moments (ZeRO-1)");
  positive("--repeats", o->repeats);
  train->callback([o] { bench_train(*o); });
}

}  // namespace entrain::cli
