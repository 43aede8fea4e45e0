// entrain bench: speed of the training step, here, and of attention, in bench_attention.cpp and
// bench_decode.cpp, next to what this machine gives, measured in the same minute. Medians of
// repeated runs.
#include "cli/bench.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/gpu.h"
#include "core/median.h"
#include "core/mirror.h"
#include "core/rng.h"
#include "core/version.h"
#include "model/decoder.h"
#include "optim/adamw.h"
#include "train/device.h"
#include "train/machine.h"

namespace entrain::cli {
namespace {

using Clock = std::chrono::steady_clock;

double timed(const std::function<void()>& f) {
  const auto begin = Clock::now();
  f();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct TrainShape {
  ModelConfig model{.n_layer = 4,
                    .d_model = 256,
                    .n_head = 8,
                    .n_kv_head = 2,
                    .head_dim = 32,
                    .d_ff = 704,
                    .vocab = 2048};
  AttentionConfig attention{.chunk = 32};
  int batch = 4, tokens = 1024, repeats = 7;
  bool recompute = false, json = false;
  std::string device = "auto";
};

/// A training step whose parts can be run one by one.
class Step {
 public:
  Step(const TrainShape& s, Device device)
      : decoder_(s.model, s.attention, s.tokens, 1, true, device, choose_dtype("auto", device)),
        optimizer_(decoder_.params(), {}),
        memory_(device),
        update_time_(device),
        read_(decoder_.read()) {
    for (const bool committed : {false, true}) {
      if (committed) memory_.commit();
      memory_.rewind();
      tape_ = std::make_unique<Tape>(
          memory_,
          Tape::Options{.dtype = decoder_.dtype(), .training = true, .recompute = s.recompute});
      const Tensor tokens = tape_->keep({s.batch, s.tokens}, DType::i32);
      const Tensor targets = tape_->keep({s.batch, s.tokens}, DType::i32);
      decoder_.loss(*tape_, tokens, targets, 1.0 / static_cast<double>(tokens.numel()));
      if (!committed) continue;
      Rng rng(1, 0);
      for (const Tensor& t : {tokens, targets}) {
        Mirror ids(t);
        for (int64_t i = 0; i < t.numel(); ++i) {
          ids.host().ptr<int32_t>()[i] =
              static_cast<int32_t>(rng.below(static_cast<uint64_t>(s.model.vocab)));
        }
        ids.upload();
      }
    }
  }

  /// Runs the passes and the update, on the GPU as a graph of all.
  void run() {
    optimizer_.prepare(++count_, 1e-4);
    const auto work = [&] {
      tape_->forward();
      tape_->backward();
      update_time_.reset();
      update_time_.start();
      optimizer_.update();
      update_time_.stop();
    };
    if (decoder_.device() == Device::cpu) return work();
    if (count_ == 1) {
      work();  // makes what is made once
    } else {
      if (!graph_) graph_.emplace().capture(work);
      graph_->launch();
    }
    gpu::synchronize();
  }
  /// From now on run() times its parts, which costs it a little.
  void time_parts() {
    tape_->time_ops("");
    graph_.reset();
  }
  std::map<std::string, OpTime> parts() const { return tape_->times(); }
  double update_seconds() const { return update_time_.seconds(); }

  /// Operations of attention in a step, as counted since the last call.
  double attention_flops() {
    read_.download();
    double sum = 0;
    double* fields = read_.host().ptr<double>();
    for (int64_t i = 0; i < read_.host().numel(); i += read_fields) sum += fields[i + read_flops];
    std::fill_n(fields, read_.host().numel(), 0.0);
    read_.upload();
    return sum;
  }

  const Decoder& decoder() const { return decoder_; }
  size_t memory() const { return memory_.peak(); }

 private:
  Decoder decoder_;
  Optimizer optimizer_;
  TapeMemory memory_;
  std::unique_ptr<Tape> tape_;
  Stopwatch update_time_;
  Mirror read_;
  std::optional<gpu::Graph> graph_;
  int count_ = 0;
};

void bench_train(const TrainShape& s) {
  const Device device = choose_device(s.device);
  Step step(s, device);
  const double tokens = static_cast<double>(s.batch) * s.tokens;
  step.run();  // warms up
  step.run();
  step.attention_flops();
  MatmulRate matmul(device);
  std::vector<double> seconds, rates, share;
  double flops = 0;
  for (int i = 0; i < s.repeats; ++i) {
    seconds.push_back(timed([&] { step.run(); }));
    flops = 6.0 * static_cast<double>(s.batch * step.decoder().products(s.tokens)) +
            step.attention_flops();
    rates.push_back(matmul.measure());
    share.push_back(flops / seconds.back() / rates.back());
  }
  step.time_parts();
  step.run();
  step.run();
  const double time = median(seconds);
  const size_t peak = peak_held_bytes(device);

  if (s.json) {
    nlohmann::ordered_json out{{"tokens_per_second", tokens / time},
                               {"step_ms", 1e3 * time},
                               {"tflops", flops / time / 1e12},
                               {"matmul_tflops", median(rates) / 1e12},
                               {"share_of_matmul", median(share)},
                               {"peak_memory_bytes", peak},
                               {"commit", code_version()}};
    for (const auto& [name, part] : step.parts()) {
      out["parts"][name] = 1e3 * (part.forward + part.backward);
    }
    out["parts"]["update"] = 1e3 * step.update_seconds();
    if (device == Device::cuda) {
      out["gpu"] = gpu::info().name;
      out["driver"] = gpu::info().driver;
    }
    fmt::print("{}\n", out.dump());
    return;
  }
  fmt::print(
      "training step: {} layers, d_model {}, {}/{} heads of {}, d_ff {}, vocabulary {}, {} x {} "
      "tokens, attention {}, {} {}\n",
      s.model.n_layer, s.model.d_model, s.model.n_head, s.model.n_kv_head, s.model.head_dim,
      s.model.d_ff, s.model.vocab, s.batch, s.tokens, s.attention.method, where(device),
      name_of(step.decoder().dtype()));
  fmt::print("  {:<18}{:>10}{:>10}\n", "part", "forward", "backward");
  for (const auto& [name, part] : step.parts()) {
    fmt::print("  {:<18}{:>7.2f} ms{:>7.2f} ms\n", name, 1e3 * part.forward, 1e3 * part.backward);
  }
  fmt::print("  {:<18}{:>7.2f} ms\n", "update", 1e3 * step.update_seconds());
  fmt::print("  {:<18}{:>7.2f} ms, median of {}; the parts are those of one step more\n", "step",
             1e3 * time, s.repeats);
  fmt::print("  {:.0f} tokens/s, {:.3f} TFLOP/s of {:.2f} TFLOP in a step\n", tokens / time,
             flops / time / 1e12, flops / 1e12);
  fmt::print("  {}: {:.3f} TFLOP/s; the step runs at {:.1f} % of it\n", matmul.name(),
             median(rates) / 1e12, 100 * median(share));
  fmt::print("  activations and gradients {:.0f} MiB, in all {:.0f} MiB\n",
             static_cast<double>(step.memory()) / (1 << 20), static_cast<double>(peak) / (1 << 20));
}

}  // namespace

std::string where(Device device) {
  return device == Device::cuda ? gpu::info().name
                                : fmt::format("{} threads", omp_get_max_threads());
}

void add_bench(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Measure speed on this machine");
  bench->require_subcommand(1);
  bench->footer(
      "Examples:\n  entrain bench train --batch 4 --tokens 1024\n"
      "  entrain bench attention --shape B1,Hq32,Hkv2,D128,N16384 --density 0.25 0.125\n"
      "  entrain bench decode --context 98304 --batch 1 8 64 --density 0.0625");

  auto t = std::make_shared<TrainShape>();
  CLI::App* train = bench->add_subcommand("train", "The training step");
  train->add_option("--n-layer", t->model.n_layer)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--d-model", t->model.d_model)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--n-head", t->model.n_head)->capture_default_str()->check(CLI::PositiveNumber);
  train->add_option("--n-kv-head", t->model.n_kv_head)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--head-dim", t->model.head_dim)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--d-ff", t->model.d_ff)->capture_default_str()->check(CLI::PositiveNumber);
  train->add_option("--vocab", t->model.vocab)->capture_default_str()->check(CLI::PositiveNumber);
  train->add_option("--batch", t->batch, "sequences")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--tokens", t->tokens, "of a sequence")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--method", t->attention.method, "attention method")->capture_default_str();
  train->add_option("--chunk", t->attention.chunk)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train->add_option("--gamma", t->attention.gamma)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  add_device(*train, t->device);
  train->add_flag("--json", t->json, "one JSON object instead of text");
  train->add_flag("--recompute", t->recompute, "recompute activations per block");
  train->add_option("--repeats", t->repeats)->capture_default_str()->check(CLI::PositiveNumber);
  train->callback([t] { bench_train(*t); });

  add_bench_attention(*bench);
  add_bench_decode(*bench);
}

}  // namespace entrain::cli
