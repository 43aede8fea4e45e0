// entrain bench decode: attention of one new token for each sequence of a batch, as Generator runs
// it, over all of the context and over what DashAttention chooses of it.
#include <cmath>
#include <optional>

#include "attention/attention.h"
#include "cli/bench_density.h"
#include "cli/bench_inputs.h"
#include "cli/bench_layer.h"
#include "core/gpu.h"
#include "core/median.h"
#include "train/device.h"

namespace entrain::cli {
namespace {

constexpr const char* form = "Hq32,Hkv2,D128";

struct Options {
  std::string shape = "Hq8,Hkv2,D64", device = "auto";
  int64_t context = 4096;
  std::vector<int64_t> batches{1};
  std::vector<double> densities{0.0625};
  AttentionConfig config{.method = "dash"};
  int repeats = 7;
};

/// The context of a batch in several layers: what is read once in all of them is more than caches
/// hold, as in a model whose other layers run in between.
struct Context {
  Context(const AttentionSizes& s, int64_t layers, const TopicInputs& rows, Device device,
          DType dtype)
      : sizes(s), memory(device) {
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      q = memory.alloc({s.B, 1, s.Hq * s.D}, dtype);
      k = memory.alloc({layers * s.B, s.Hkv, s.N, s.D}, dtype);
      v = memory.alloc(k.shape, dtype);
    }
    Mirror queries(q);
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t h = 0; h < s.Hq; ++h) {
        rows.query(b, h, s.N - 1, queries.host().ptr<float>() + (b * s.Hq + h) * s.D);
      }
    }
    queries.upload();
    fill(k, [&](int64_t r, int64_t token, float* to) { rows.key(0, r, token, to); });
    fill(v, [&](int64_t r, int64_t token, float* to) { rows.noise(0, 0, r, token, to); });
  }

  int64_t layers() const { return k[0] / sizes.B; }
  Tensor of_layer(Tensor x, int64_t layer) const { return x.slice(0, layer * sizes.B, sizes.B); }

  const AttentionSizes sizes;
  Arena memory;
  Tensor q, k, v;

 private:
  /// One sequence, and copies of it.
  template <class F>
  void fill(Tensor x, F row) const {
    const Tensor one = x.slice(0, 0, 1);
    Mirror mirror(one);
    float* to = mirror.host().ptr<float>();
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t r = 0; r < sizes.Hkv; ++r) {
      for (int64_t i = 0; i < sizes.N; ++i) row(r, i, to + (r * sizes.N + i) * sizes.D);
    }
    mirror.upload();
    for (int64_t i = 1; i < x[0]; ++i) copy(one, x.slice(0, i, 1));
  }
};

/// A method's attention in all layers.
class Decoding {
 public:
  Decoding(const AttentionConfig& config, const Context& context)
      : method_(make_attention(config)),
        last_(context.sizes.N - 1),
        layers_(context.layers()),
        memory_(context.memory.device()) {
    for (const bool committed : {false, true}) {
      if (committed) memory_.commit();
      memory_.rewind();
      tape_ = std::make_unique<Tape>(memory_, Tape::Options{.dtype = context.q.dtype});
      record(context, config, committed);
    }
  }

  Decoding(const Decoding&) = delete;  // the tape refers to last_
  Decoding& operator=(const Decoding&) = delete;

  void seek(double density) {
    cli::seek(method_->gamma(), density, [&] { return read().density(); });
  }
  /// What one layer reads.
  ReadCounters::Read read() {
    const ReadCounters::Read all = counters_.during([&] { tape_->forward(); });
    const auto layers = static_cast<double>(layers_);
    return {all.pairs / layers, all.causal / layers, all.flops / layers};
  }
  /// Of summaries, in one layer.
  double summary_bytes() const { return summary_bytes_; }

  /// Seconds of a layer, over so many steps.
  double time(int steps) {
    Stopwatch watch(tape_->device());
    prepare();
    watch.start();
    for (int i = 0; i < steps; ++i) step();
    watch.stop();
    wait();
    return watch.seconds() / static_cast<double>(steps * layers_);
  }
  /// The share of routing in a step, timed part by part.
  double routing_share() {
    tape_->time_ops("");
    graph_.reset();
    prepare();
    step();
    wait();
    const double routing = tape_->time("routing").forward;
    return routing / (routing + tape_->time("attention").forward);
  }

 private:
  void record(const Context& context, const AttentionConfig& config, bool committed) {
    const auto [B, Hq, Hkv, D, N] = context.sizes;
    const HeadShape shape{Hq, Hkv, D};
    const Tensor read = tape_->keep({Hkv, read_fields}, DType::f64);
    const Tensor o = tape_->keep(context.q.shape);
    AttentionInput in{.q = {heads(context.q, 0, Hq, D), {}},
                      .k = {},
                      .v = {},
                      .projected = {},
                      .params = {},
                      .read = read,
                      .entropy = {},
                      .first = &last_};
    for (const ParamSpec& spec : method_->params(shape)) {
      in.params.push_back({tape_->keep(spec.shape, tape_->sum_dtype()), {}});
    }
    for (int64_t layer = 0; layer < layers_; ++layer) {
      in.k.value = context.of_layer(context.k, layer);
      in.v.value = context.of_layer(context.v, layer);
      in.cache.clear();
      for (CacheSpec spec : method_->cache(shape, N, tape_->dtype())) {
        spec.shape.extent[0] = B;
        const Tensor kbar = tape_->keep(spec.shape, spec.dtype);
        in.cache.push_back(kbar);
        summary_bytes_ = static_cast<double>(kbar.bytes());
        if (!committed) continue;
        with_kernels(tape_->device(), [&](auto kernels) {
          kernels.dash_summaries(in.k.value, {}, config.chunk, kbar);
        });
      }
      method_->record(*tape_, in, {heads(o, 0, Hq, D), {}});
    }
    counters_ = ReadCounters(read);
  }

  /// On the GPU a step is one graph.
  void prepare() {
    if (tape_->device() == Device::cpu || graph_) return;
    tape_->forward();  // makes what is made once
    graph_.emplace().capture([&] { tape_->forward(); });
    graph_->launch();
  }
  void step() { graph_ ? graph_->launch() : tape_->forward(); }
  void wait() const {
    if (tape_->device() == Device::cuda) gpu::synchronize();
  }

  std::unique_ptr<AttentionMethod> method_;
  const int64_t last_, layers_;  // the new token; layers
  TapeMemory memory_;
  std::unique_ptr<Tape> tape_;
  ReadCounters counters_;
  double summary_bytes_ = 0;
  std::optional<gpu::Graph> graph_;
};

struct Row {
  Decoding decoding;
  std::vector<double> seconds = {}, of_full = {};
};

void bench_batch(const Options& options, AttentionSizes s, int64_t batch, Device device) {
  constexpr double beyond_caches = 256e6;
  constexpr int64_t most_sequences = 64;  // in all layers
  constexpr int steps = 10;
  s.B = batch;
  s.N = options.context;
  const DType dtype = choose_dtype("auto", device);
  const auto row_bytes = static_cast<double>(2 * s.D) * static_cast<double>(size_of(dtype));
  const double least = *std::ranges::min_element(options.densities);
  const double sequence_bytes = least * static_cast<double>(s.B * s.Hkv * s.N) * row_bytes;
  const auto layers = std::clamp<int64_t>(std::llround(beyond_caches / sequence_bytes), 1,
                                          std::max<int64_t>(1, most_sequences / s.B));
  const Context context(s, layers, TopicInputs(s, options.config.chunk, 1), device, dtype);

  std::vector<std::unique_ptr<Row>> rows;
  rows.emplace_back(new Row{Decoding({.method = "full"}, context)});
  for (const double density : options.densities) {
    rows.emplace_back(new Row{Decoding(options.config, context)})->decoding.seek(density);
  }
  for (int i = 0; i <= options.repeats; ++i) {  // side by side: noise meets all alike
    double full = 0;
    for (const auto& row : rows) {
      const double seconds = row->decoding.time(steps);
      if (row == rows.front()) full = seconds;
      if (i == 0) continue;  // warms up
      row->seconds.push_back(seconds);
      row->of_full.push_back(seconds / full);
    }
  }
  for (const auto& row : rows) {
    const ReadCounters::Read read = row->decoding.read();
    const double bytes = read.pairs * row_bytes + row->decoding.summary_bytes();
    const double seconds = median(row->seconds), routing = seconds * row->decoding.routing_share();
    fmt::print("{:>6}{:>8}{:>8}{:>10.4f}{:>11.1f}{:>11.1f}{:>11.1f}{:>10.1f}{:>8.0f}{:>10.3f}\n",
               batch, layers, row == rows.front() ? "full" : "dash", read.density(), 1e6 * seconds,
               1e6 * routing, 1e6 * (seconds - routing), bytes / 1e6, bytes / seconds / 1e9,
               median(row->of_full));
  }
}

void bench_decode(const Options& options) {
  const AttentionSizes sizes = parse_shape(options.shape, form);
  const Device device = choose_device(options.device);
  fmt::print(
      "decoding one token a sequence: {}, context {}, chunk {}, {} {}\n"
      "microseconds of a layer, medians of {}; MB: keys and values attended, and all summaries\n"
      "{:>6}{:>8}{:>8}{:>10}{:>11}{:>11}{:>11}{:>10}{:>8}{:>10}\n",
      options.shape, options.context, options.config.chunk, where(device),
      name_of(choose_dtype("auto", device)), options.repeats, "batch", "layers", "method",
      "density", "total", "routing", "attention", "MB", "GB/s", "of full");
  for (const int64_t batch : options.batches) bench_batch(options, sizes, batch, device);
}

}  // namespace

void add_bench_decode(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* decode = bench.add_subcommand("decode", "Attention of one new token");
  decode->add_option("--shape", o->shape, "heads and head_dim")->capture_default_str();
  decode->add_option("--context", o->context, "tokens of a sequence, the new one included")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  decode->add_option("--batch", o->batches, "one or more numbers of sequences")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 16));
  decode->add_option("--density", o->densities, "one or more of dash, reached by gamma")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1.0));
  decode->add_option("--chunk", o->config.chunk, "tokens in a chunk of dash")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  add_device(*decode, o->device);
  decode->add_option("--repeats", o->repeats)->capture_default_str()->check(CLI::PositiveNumber);
  decode->callback([o] { bench_decode(*o); });
}

}  // namespace entrain::cli
