// entrain bench: speed of the training step and of attention, each next to this machine's own
// matrix product, measured in the same minute. Medians of repeated runs.
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
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

std::string where(Device device) {
  return device == Device::cuda ? gpu::info().name
                                : fmt::format("{} threads", omp_get_max_threads());
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

struct AttentionShape {
  int batch = 1, n_head = 8, n_kv_head = 2, head_dim = 32, tokens = 4096, chunk = 32, repeats = 7;
  std::string device = "auto";
  Device on = Device::cpu;  // what `device` came to
  std::vector<double> densities{0.5, 0.25, 0.125, 0.0625};
};

/// One attention layer's forward and backward on a tape, inputs drawn so that runs of keys and the
/// queries near them share directions: routing has something to find.
class Layer {
 public:
  Layer(const AttentionConfig& config, const AttentionShape& s)
      : method_(make_attention(config)), memory_(s.on) {
    const int64_t B = s.batch, N = s.tokens, D = s.head_dim;
    const int64_t width = (s.n_head + 2 * s.n_kv_head) * D;
    for (const bool committed : {false, true}) {
      if (committed) memory_.commit();
      memory_.rewind();
      tape_ = std::make_unique<Tape>(
          memory_, Tape::Options{.dtype = choose_dtype("auto", s.on), .training = true});
      const Var qkv = tape_->var({B, N, width}), o = tape_->var({B, N, s.n_head * D});
      const auto heads = [&](const Tensor& t, int64_t first, int64_t count) {
        return t.slice(2, first * D, count * D).split(2, D).transpose(1, 2);
      };
      const auto part = [&](const Var& x, int64_t first, int64_t count) {
        return Var{heads(x.value, first, count), heads(x.grad, first, count)};
      };
      const Tensor read = tape_->keep({s.n_kv_head, read_fields}, DType::f64);
      AttentionInput in{part(qkv, 0, s.n_head),
                        part(qkv, s.n_head, s.n_kv_head),
                        part(qkv, s.n_head + s.n_kv_head, s.n_kv_head),
                        {},
                        {},
                        read};
      for (const ParamSpec& spec : method_->params({s.n_head, s.n_kv_head, D})) {
        in.params.push_back(tape_->var(spec.shape, tape_->sum_dtype()));
      }
      method_->record(*tape_, in, part(o, 0, s.n_head));
      if (!committed) continue;
      fill(qkv.value, o.grad);
      read_ = Mirror(read);
      tape_->time_ops("");
    }
  }

  double density() {
    double* fields = read_.host().ptr<double>();
    std::fill_n(fields, read_.host().numel(), 0.0);
    read_.upload();
    tape_->forward();
    read_.download();
    double pairs = 0, causal = 0;
    for (int64_t j = 0; j < read_.host().numel(); j += read_fields) {
      pairs += fields[j + read_pairs];
      causal += fields[j + read_causal];
    }
    return pairs / causal;
  }

  /// Turns gamma until routing attends the density.
  double seek(double target) {
    double low = 1e-3, high = 1e4;
    for (int i = 0; i < 40; ++i) {
      *method_->gamma() = std::sqrt(low * high);
      (density() > target ? low : high) = *method_->gamma();
    }
    return density();
  }

  /// Forward and backward; seconds of the ops named so then stand in time().
  void run() {
    tape_->forward();
    tape_->backward();
    if (tape_->device() == Device::cuda) gpu::synchronize();
  }
  double time(const char* op) const {
    const OpTime time = tape_->time(op);
    return time.forward + time.backward;
  }

 private:
  static void fill(Tensor qkv, Tensor dout) {
    constexpr int64_t run = 16;  // tokens that share a direction
    Rng rng(1, 0);
    const int64_t width = qkv[2];
    std::vector<float> shared(static_cast<size_t>(width));
    Mirror inputs(qkv), gradients(dout);
    float* x = inputs.host().ptr<float>();
    for (int64_t i = 0; i < qkv[0] * qkv[1]; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        if (i % run == 0) shared[static_cast<size_t>(j)] = static_cast<float>(rng.normal());
        *x++ = shared[static_cast<size_t>(j)] + 0.6f * static_cast<float>(rng.normal());
      }
    }
    float* g = gradients.host().ptr<float>();
    for (int64_t i = 0; i < dout.numel(); ++i) g[i] = static_cast<float>(rng.normal());
    inputs.upload();
    gradients.upload();
  }

  std::unique_ptr<AttentionMethod> method_;
  TapeMemory memory_;
  std::unique_ptr<Tape> tape_;
  Mirror read_;
};

void bench_attention(AttentionShape s) {
  s.on = choose_device(s.device);
  struct Row {
    Layer layer;
    double density;
    std::vector<double> engine, router, of_full;
  };
  std::vector<std::unique_ptr<Row>> rows;
  const auto add = [&](const AttentionConfig& config, double density) -> Row& {
    return *rows.emplace_back(new Row{Layer(config, s), density, {}, {}, {}});
  };
  const Row& full = add({.method = "full"}, 1);
  for (const double density : s.densities) {
    Row& row = add({.method = "dash", .chunk = s.chunk}, density);
    row.density = row.layer.seek(density);
  }
  MatmulRate matmul(s.on);
  std::vector<double> rates;
  for (int i = 0; i <= s.repeats; ++i) {  // side by side: noise meets all alike
    double full_time = 0;
    for (const auto& row : rows) {
      row->layer.run();
      const double engine = row->layer.time("attention"), router = row->layer.time("routing");
      if (row.get() == &full) full_time = engine;
      if (i == 0) continue;  // warms up
      row->engine.push_back(engine);
      row->router.push_back(router);
      row->of_full.push_back((engine + router) / full_time);
    }
    rates.push_back(matmul.measure());
  }
  fmt::print("attention: batch {}, {}/{} heads of {}, {} tokens, chunk {}, {}\n", s.batch, s.n_head,
             s.n_kv_head, s.head_dim, s.tokens, s.chunk, where(s.on));
  fmt::print(
      "forward and backward, medians of {}; engine: attention over the chosen blocks, against time "
      "in proportion to density\n"
      "        density     engine     router  of full  engine/density  GFLOP/s\n",
      s.repeats);
  const double flops = 12.0 * s.batch * s.n_head * s.tokens * (s.tokens + 1.0) / 2 * s.head_dim;
  const double first = median(rows[1]->engine) / rows[1]->density;
  for (const auto& row : rows) {
    const double engine = median(row->engine);
    fmt::print("  {:4}    {:.3f}  {:6.1f} ms  {:6.1f} ms    {:.3f}           {:.2f}  {:7.1f}\n",
               row.get() == &full ? "full" : "dash", row->density, 1e3 * engine,
               1e3 * median(row->router), median(row->of_full), engine / row->density / first,
               row->density * flops / engine / 1e9);
  }
  fmt::print("{}: {:.1f} GFLOP/s\n", matmul.name(), median(rates) / 1e9);
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Measure speed on this machine");
  bench->require_subcommand(1);
  bench->footer(
      "Examples:\n  entrain bench train --batch 4 --tokens 1024\n"
      "  entrain bench attention --tokens 4096 --density 0.5 0.125");

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

  auto a = std::make_shared<AttentionShape>();
  CLI::App* attention = bench->add_subcommand("attention", "DashAttention against full attention");
  attention->add_option("--batch", a->batch)->capture_default_str()->check(CLI::PositiveNumber);
  attention->add_option("--n-head", a->n_head)->capture_default_str()->check(CLI::PositiveNumber);
  attention->add_option("--n-kv-head", a->n_kv_head)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  attention->add_option("--head-dim", a->head_dim)
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  attention->add_option("--tokens", a->tokens)->capture_default_str()->check(CLI::PositiveNumber);
  attention->add_option("--chunk", a->chunk)->capture_default_str()->check(CLI::PositiveNumber);
  attention->add_option("--density", a->densities, "one or more of DashAttention, reached by gamma")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1.0));
  add_device(*attention, a->device);
  attention->add_option("--repeats", a->repeats)->capture_default_str()->check(CLI::PositiveNumber);
  attention->callback([a] { bench_attention(*a); });
}

}  // namespace entrain::cli
