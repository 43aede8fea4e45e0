// entrain bench: speed of the training step and of attention, each next to this machine's own
// matrix product, measured in the same minute. Medians of repeated runs.
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <functional>

#include "cli/commands.h"
#include "core/median.h"
#include "core/rng.h"
#include "model/decoder.h"
#include "optim/adamw.h"
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
  bool recompute = false;
};

void bench_train(const TrainShape& s) {
  Decoder decoder(s.model, s.attention, s.tokens, 1, true, Device::cpu);
  TapeMemory memory(Device::cpu);
  std::unique_ptr<Tape> tape;
  Tensor tokens, targets;
  for (const bool committed : {false, true}) {
    if (committed) memory.commit();
    memory.rewind();
    tape =
        std::make_unique<Tape>(memory, Tape::Options{.training = true, .recompute = s.recompute});
    tokens = tape->keep({s.batch, s.tokens}, DType::i32);
    targets = tape->keep({s.batch, s.tokens}, DType::i32);
    decoder.loss(*tape, tokens, targets, 1.0 / static_cast<double>(tokens.numel()));
  }
  Rng rng(1, 0);
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    tokens.ptr<int32_t>()[i] =
        static_cast<int32_t>(rng.below(static_cast<uint64_t>(s.model.vocab)));
    targets.ptr<int32_t>()[i] =
        static_cast<int32_t>(rng.below(static_cast<uint64_t>(s.model.vocab)));
  }
  const OptimConfig optim;
  std::vector<double> forward, backward, update, step, share, rates;
  double flops = 0;
  for (int i = 0; i <= s.repeats; ++i) {
    Tensor read = decoder.read();
    std::fill_n(read.ptr<double>(), read.numel(), 0.0);
    const double f = timed([&] { tape->forward(); });
    double attention = 0;
    for (int64_t j = 0; j < read.numel(); j += read_fields)
      attention += read.ptr<double>()[j + read_flops];
    const double b = timed([&] { tape->backward(); });
    const double u = timed(
        [&] { adamw_step(decoder.params(), optim, i + 1, 1e-4, grad_norm(decoder.params())); });
    const double rate = matmul_rate();
    if (i == 0) continue;  // warms up
    flops = 6.0 * static_cast<double>(s.batch * decoder.products(s.tokens)) + attention;
    forward.push_back(f), backward.push_back(b), update.push_back(u), step.push_back(f + b + u);
    rates.push_back(rate), share.push_back(flops / (f + b + u) / rate);
  }
  fmt::print(
      "training step: {} layers, d_model {}, {}/{} heads of {}, d_ff {}, vocabulary {}, {} x {} "
      "tokens, "
      "attention {}, {} threads\n",
      s.model.n_layer, s.model.d_model, s.model.n_head, s.model.n_kv_head, s.model.head_dim,
      s.model.d_ff, s.model.vocab, s.batch, s.tokens, s.attention.method, omp_get_max_threads());
  fmt::print("  forward and loss  {:8.1f} ms\n  backward          {:8.1f} ms\n",
             1e3 * median(forward), 1e3 * median(backward));
  fmt::print("  AdamW             {:8.1f} ms\n  step              {:8.1f} ms\n",
             1e3 * median(update), 1e3 * median(step));
  fmt::print("  {:.0f} tokens/s, {:.1f} GFLOP/s of {:.1f} GFLOP in a step\n",
             static_cast<double>(tokens.numel()) / median(step), flops / median(step) / 1e9,
             flops / 1e9);
  fmt::print("  float32 matrix product 1024^3: {:.1f} GFLOP/s; the step runs at {:.1f} % of it\n",
             median(rates) / 1e9, 100 * median(share));
  fmt::print("  activations and gradients {:.0f} MiB\n",
             static_cast<double>(memory.peak()) / (1 << 20));
}

struct AttentionShape {
  int batch = 1, n_head = 8, n_kv_head = 2, head_dim = 32, tokens = 4096, chunk = 32, repeats = 7;
  std::vector<double> densities{0.5, 0.25, 0.125, 0.0625};
};

/// One attention layer's forward and backward on a tape, inputs drawn so that runs of keys and the
/// queries near them share directions: routing has something to find.
class Layer {
 public:
  Layer(const AttentionConfig& config, const AttentionShape& s)
      : method_(make_attention(config)), memory_(Device::cpu) {
    const int64_t B = s.batch, N = s.tokens, D = s.head_dim;
    const int64_t width = (s.n_head + 2 * s.n_kv_head) * D;
    for (const bool committed : {false, true}) {
      if (committed) memory_.commit();
      memory_.rewind();
      tape_ = std::make_unique<Tape>(memory_, Tape::Options{.training = true});
      const Var qkv = tape_->var({B, N, width}), o = tape_->var({B, N, s.n_head * D});
      const auto heads = [&](const Tensor& t, int64_t first, int64_t count) {
        return t.slice(2, first * D, count * D).split(2, D).transpose(1, 2);
      };
      const auto part = [&](const Var& x, int64_t first, int64_t count) {
        return Var{heads(x.value, first, count), heads(x.grad, first, count)};
      };
      read_ = tape_->keep({s.n_kv_head, read_fields}, DType::f64);
      AttentionInput in{part(qkv, 0, s.n_head),
                        part(qkv, s.n_head, s.n_kv_head),
                        part(qkv, s.n_head + s.n_kv_head, s.n_kv_head),
                        {},
                        {},
                        read_};
      for (const ParamSpec& spec : method_->params({s.n_head, s.n_kv_head, D})) {
        in.params.push_back(tape_->var(spec.shape));
      }
      method_->record(*tape_, in, part(o, 0, s.n_head));
      if (committed) fill(qkv.value, o.grad);
    }
  }

  double density() {
    std::fill_n(read_.ptr<double>(), read_.numel(), 0.0);
    tape_->forward();
    double pairs = 0, causal = 0;
    for (int64_t j = 0; j < read_.numel(); j += read_fields) {
      pairs += read_.ptr<double>()[j + read_pairs];
      causal += read_.ptr<double>()[j + read_causal];
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
    tape_->clear_times();
    tape_->forward();
    tape_->backward();
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
    for (int64_t i = 0; i < qkv[0] * qkv[1]; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        if (i % run == 0) shared[static_cast<size_t>(j)] = static_cast<float>(rng.normal());
        qkv.ptr<float>()[i * width + j] =
            shared[static_cast<size_t>(j)] + 0.6f * static_cast<float>(rng.normal());
      }
    }
    for (int64_t i = 0; i < dout.numel(); ++i)
      dout.ptr<float>()[i] = static_cast<float>(rng.normal());
  }

  std::unique_ptr<AttentionMethod> method_;
  TapeMemory memory_;
  std::unique_ptr<Tape> tape_;
  Tensor read_;
};

void bench_attention(const AttentionShape& s) {
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
    rates.push_back(matmul_rate());
  }
  fmt::print("attention: batch {}, {}/{} heads of {}, {} tokens, chunk {}, {} threads\n", s.batch,
             s.n_head, s.n_kv_head, s.head_dim, s.tokens, s.chunk, omp_get_max_threads());
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
  fmt::print("float32 matrix product 1024^3: {:.1f} GFLOP/s\n", median(rates) / 1e9);
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
  attention->add_option("--repeats", a->repeats)->capture_default_str()->check(CLI::PositiveNumber);
  attention->callback([a] { bench_attention(*a); });
}

}  // namespace entrain::cli
