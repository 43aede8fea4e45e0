#include "train/run.h"

#include <chrono>
#include <cmath>
#include <optional>

#include "core/file.h"
#include "core/version.h"
#include "optim/density_controller.h"
#include "optim/schedule.h"
#include "train/checkpoint.h"
#include "train/config_keys.h"
#include "train/device.h"
#include "train/evaluate.h"
#include "train/machine.h"
#include "train/metrics.h"
#include "train/moments.h"
#include "train/signals.h"
#include "train/together.h"
#include "train/train_step.h"

namespace entrain {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double mib(size_t bytes) {
  return static_cast<double>(bytes) / (1 << 20);
}

class Run {
 public:
  Run(const RunConfig& config, Comm& comm, Listener& listener, double matmul_rate);

  RunEnd train(bool resume);

 private:
  void say(const std::string& line) {
    if (main_) listener_.say(line);
  }
  bool complete() const { return state_.step >= config_.train.steps; }
  void start(bool resume);
  void resume_from(const std::string& path);
  void refuse_other_model(const std::string& path, RunConfig before);
  void init_from(const std::string& path);
  void seek_density();
  void turn_knobs(int64_t step);
  StepMetrics step();
  int64_t tokens() const;  // trained on
  void write_metrics(nlohmann::ordered_json line);
  void evaluate();
  void save();

  RunConfig config_;
  Comm& comm_;
  const bool main_;  // rank 0: speaks and writes
  Listener& listener_;
  TokenStore store_;
  Sampler sampler_;
  std::optional<Decoder> decoder_;
  Device device_;
  TapeMemory memory_;
  std::optional<TrainStep> step_;
  std::optional<Evaluator> evaluator_;
  std::optional<DensityController> controller_;
  std::optional<FolderLock> lock_;
  std::optional<MetricsWriter> metrics_;
  TrainState state_;
  double peak_rate_;         // matrix products, all ranks together
  double step_seconds_ = 0;  // smoothed
  int64_t saved_step_ = -1, evaluated_step_ = -1;
  Clock::time_point written_ = Clock::now();  // the last line of metrics, or the run's start
};

Run::Run(const RunConfig& config, Comm& comm, Listener& listener, double matmul_rate)
    : config_(config),
      comm_(comm),
      main_(comm.rank() == 0),
      listener_(listener),
      store_(config.data.path),
      sampler_(store_, config.data.seq_len, config.train.seed),
      device_(comm.device()),
      memory_(device_),
      peak_rate_(matmul_rate) {
  config_.model.vocab = store_.vocab();
  require_sequence(store_, Split::validation, config.data.seq_len);

  const size_t before = held_bytes(device_);
  const Shard shard = config.train.shard_optimizer ? Shard{comm.rank(), comm.size()} : Shard{};
  decoder_.emplace(config_.model, config.attention, config.data.seq_len, config.train.seed, true,
                   device_, choose_dtype(config.dtype, device_), shard);
  const auto record = [&] {  // training and evaluation take turns in the same memory
    memory_.rewind();
    step_.emplace(config_, *decoder_, memory_, comm_);
    memory_.rewind();
    evaluator_.emplace(*decoder_, memory_, config.data.seq_len);
  };
  record();
  const size_t parameters = decoder_->params().bytes();
  say(fmt::format(
      "{} parameters, {} layers, attention {}; {} rank{}, {} sequences of {} tokens a step",
      decoder_->params().numel(), config.model.n_layer, config.attention.method, comm.size(),
      comm.size() > 1 ? "s" : "", config.train.global_batch, config.data.seq_len));
  say(fmt::format(
      "memory a rank: {:.0f} MiB predicted (program {:.0f}, parameters and moments {:.0f}, "
      "activations and gradients {:.0f})",
      mib(before + parameters + memory_.peak()), mib(before), mib(parameters),
      mib(memory_.peak())));
  memory_.commit();
  record();
  if (double* gamma = decoder_->attention().gamma(); gamma && config.attention.target_density > 0) {
    controller_.emplace(config.attention.target_density, *gamma);
  }
}

void Run::start(bool resume) {
  comm_.sum(&peak_rate_, 1);
  std::string checkpoint, donor;
  together(comm_, [&] {
    if (!main_) return;
    const std::string folder = config_.dir + "/checkpoints";
    if (resume) {
      checkpoint = newest_valid(folder).value_or("");
    } else if (newest_valid(folder)) {
      throw ConfigError(fmt::format(
          "{} has checkpoints already; continue it with --resume, or choose another run.dir",
          config_.dir));
    }
    if (checkpoint.empty() && !config_.train.init_from.empty()) {
      donor = find_checkpoint(config_.train.init_from);
    }
  });
  broadcast(comm_, checkpoint, 0);
  broadcast(comm_, donor, 0);
  together(comm_, [&] {
    state_.sequences = config_.data.skip;
    if (!checkpoint.empty()) {
      resume_from(checkpoint);
    } else if (!donor.empty()) {
      init_from(donor);
    }
    if (!main_ || complete()) return;
    lock_.emplace(config_.dir, "trains in");
    metrics_.emplace(config_.dir, state_.step);
    replace_file(config_.dir + "/config.yaml", to_yaml(config_));
  });
  state_.rng = {config_.train.seed, 0, static_cast<uint64_t>(state_.sequences)};
}

// A run goes on with the model and data order it has; what else changed is said.
void Run::refuse_other_model(const std::string& path, RunConfig before) {
  RunConfig now = config_;
  std::string changed;
  const std::vector<Key> old_keys = keys_of(before), keys = keys_of(now);
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string was = text_of(old_keys[i].field), is = text_of(keys[i].field);
    if (was == is) continue;
    const std::string_view name = keys[i].name;
    if (keys[i].section() == "model" || name == "attention.method" || name == "data.seq_len" ||
        name == "data.skip") {
      throw ConfigError(fmt::format(
          "{} was trained with {} {}, not {}; to change it, start a run with train.init_from={}",
          path, name, was, is, path));
    }
    changed += fmt::format("{}{} {} (was {})", changed.empty() ? "" : ", ", name, is, was);
  }
  if (!changed.empty()) say("changed since the checkpoint: " + changed);
}

void Run::resume_from(const std::string& path) {
  const CheckpointInfo info = load_checkpoint(path, decoder_->params());
  state_ = info.state;
  require(info.data_fingerprint == store_.fingerprint(),
          "{} was trained on other data than {}; to go on with new data, start a run with "
          "train.init_from={}",
          path, store_.path(), path);
  refuse_other_model(path, parse_config(info.config_yaml, path));
  require(state_.rng[0] == config_.train.seed,
          "{} was trained with train.seed {}, which orders its data; do not change it on resume",
          path, state_.rng[0]);
  if (state_.controller.contains("gamma")) {
    const double gamma = state_.controller.at("gamma");
    if (double* g = decoder_->attention().gamma()) *g = gamma;
    if (controller_) controller_->restore({gamma, state_.controller.at("density")});
  }
  saved_step_ = state_.step;
  say(fmt::format("resumed from {} (step {})", path, state_.step));
  if (info.ranks != comm_.size()) {
    say(fmt::format("saved by {} ranks and resumed by {}: the same up to rounding, not bitwise",
                    info.ranks, comm_.size()));
  }
  if (info.code_version != code_version()) {
    say(fmt::format(
        "saved by version {}, resumed by {}: bitwise only if the arithmetic is the same",
        info.code_version, code_version()));
  }
}

void Run::init_from(const std::string& path) {
  const Shared shared = load_shared(path, decoder_->params());
  require(!shared.taken.empty(), "{} shares no parameter with this model; see entrain info {}",
          path, path);
  auto list = [&](const char* what, const std::vector<std::string>& names) {
    if (names.empty()) return;
    say(fmt::format("  {}: {} ({}{})", what, names.size(), names.front(),
                    names.size() > 1 ? ", ..., " + names.back() : ""));
  };
  const CheckpointInfo info = read_info(path);
  require_tokenizer(path, info.data_fingerprint, store_);
  say(fmt::format("starting from {}", path));
  list("parameters taken", shared.taken);
  list("new, started to fit those", shared.adopted);
  list("new, started fresh", shared.fresh);
  list("not used by this model", shared.unused);
  double* gamma = decoder_->attention().gamma();
  if (!gamma || !info.state.controller.contains("gamma")) return;
  const double donors = info.state.controller.at("gamma");
  if (controller_) {  // it moves on from what these parameters were trained with
    *gamma = donors;
    say(fmt::format("  gamma: {:.4g} as there, to seek attention.target_density from", donors));
  } else {
    say(fmt::format("  gamma: {:.4g} as configured ({:.4g} there)", *gamma, donors));
  }
}

// Untrained routers read everything or nothing: find the gamma that reads the target before the
// first step, by bisection on a few training sequences, and leave the rest to the controller.
void Run::seek_density() {
  double& gamma = *decoder_->attention().gamma();
  const double target = config_.attention.target_density;
  double low = 0, high = 0, density = 0;  // gammas that read too much and too little; 0: none yet
  for (int i = 0; i < 16; ++i) {
    density =
        evaluator_->run(store_, Split::train, config_.train.global_batch, comm_).read.all.density;
    if (std::abs(density / target - 1) < 0.05) break;
    (density > target ? low : high) = gamma;
    gamma = high == 0 ? 8 * low : (low == 0 ? high / 8 : std::sqrt(low * high));
  }
  controller_->restore({gamma, density});
  say(fmt::format("gamma {:.4g} reads density {:.3f} before training", gamma, density));
}

// Schedules depend on the step alone, so a resumed run is on them again.
void Run::turn_knobs(int64_t step) {
  const AttentionConfig& c = config_.attention;
  AttentionMethod& method = decoder_->attention();
  if (c.alpha_steps > 0 && method.alpha()) {
    *method.alpha() = ramp(c.alpha_start, c.alpha, c.alpha_steps, step);
  }
  if (c.gamma_steps > 0 && method.gamma()) {
    *method.gamma() = ramp(c.gamma_start, c.gamma, c.gamma_steps, step);
  }
}

int64_t Run::tokens() const {
  return (state_.sequences - config_.data.skip) * config_.data.seq_len;
}

StepMetrics Run::step() {
  const auto begin = Clock::now();
  const int64_t step = state_.step + 1;
  turn_knobs(step);
  const StepResult& result = step_->run(step, state_.sequences, sampler_);
  double* gamma = decoder_->attention().gamma();
  const double gamma_used = gamma ? *gamma : 0;
  if (controller_) *gamma = controller_->update(result.read.all.density);
  state_.step = step;
  state_.sequences += config_.train.global_batch;
  state_.rng[2] = static_cast<uint64_t>(state_.sequences);

  const double seconds = seconds_since(begin);
  step_seconds_ = step_seconds_ == 0 ? seconds : 0.9 * step_seconds_ + 0.1 * seconds;
  const double N = config_.data.seq_len, sequences = config_.train.global_batch;
  // Forward and backward of a product with weights are 2 and 4 operations a multiplication.
  const auto products = static_cast<double>(decoder_->products(config_.data.seq_len));
  const double flops = sequences * (6 * products + result.read.flops * N);
  StepMetrics m;
  m.step = step;
  m.steps = config_.train.steps;
  m.tokens = tokens();
  m.loss = result.loss;
  m.lr = result.lr;
  m.grad_norm = result.grad_norm;
  m.tokens_per_second = sequences * N / seconds;
  m.flops_per_second = flops / seconds;
  m.peak_share = m.flops_per_second / peak_rate_;
  m.density = result.read.all.density;
  m.router_density = result.read.all.router_density;
  m.gamma = gamma_used;
  if (const double* alpha = decoder_->attention().alpha()) m.alpha = *alpha;
  m.attention_seconds = result.attention_seconds;
  m.waiting_seconds = result.waiting_seconds;
  m.seconds_left = step_seconds_ * static_cast<double>(config_.train.steps - step);
  return m;
}

void Run::write_metrics(nlohmann::ordered_json line) {
  line["seconds"] = seconds_since(written_);
  written_ = Clock::now();
  together(comm_, [&] {
    if (main_) metrics_->write(line);
  });
}

void Run::evaluate() {
  if (evaluated_step_ == state_.step) return;
  evaluated_step_ = state_.step;
  const EvalResult result =
      evaluator_->run(store_, Split::validation, config_.eval.sequences, comm_);
  double peak = static_cast<double>(peak_held_bytes(device_));
  comm_.max(&peak, 1);
  std::string line =
      fmt::format("step {}: validation loss {:.4f}, perplexity {:.3f}, density {:.3f}", state_.step,
                  result.loss, result.perplexity, result.read.all.density);
  nlohmann::ordered_json metrics{{"step", state_.step},
                                 {"eval_loss", result.loss},
                                 {"eval_perplexity", result.perplexity},
                                 {"density", result.read.all.density},
                                 {"router_density", result.read.all.router_density},
                                 {"peak_memory_bytes", static_cast<int64_t>(peak)}};
  if (result.recall.answers > 0) {
    line += fmt::format(", recall accuracy {:.3f}", result.recall.accuracy());
    metrics["recall_accuracy"] = result.recall.accuracy();
  }
  say(line);
  write_metrics(metrics);
}

void Run::save() {
  if (saved_step_ == state_.step) return;
  saved_step_ = state_.step;
  state_.controller.clear();
  if (const double* gamma = decoder_->attention().gamma()) {
    state_.controller["gamma"] = *gamma;
    state_.controller["alpha"] = *decoder_->attention().alpha();
    state_.controller["density"] = controller_ ? controller_->state().density : -1;
  }
  const Moments moments = gather_moments(decoder_->params(), comm_);
  together(comm_, [&] {
    if (!main_) return;
    const std::string path = checkpoint_path(config_.dir, state_.step);
    save_checkpoint(path, decoder_->params(), moments, state_, to_yaml(config_),
                    store_.fingerprint(), comm_.size());
    prune(path, config_.checkpoint.keep);
  });
}

RunEnd Run::train(bool resume) {
  start(resume);
  if (complete()) {
    say(fmt::format("{} is complete: {} of {} steps; raise train.steps to go on", config_.dir,
                    state_.step, config_.train.steps));
    return RunEnd::complete;
  }
  turn_knobs(state_.step + 1);
  if (controller_ && state_.step == 0) seek_density();
  while (state_.step < config_.train.steps) {
    const StepMetrics metrics = step();
    if (main_) listener_.step(metrics);
    write_metrics(to_json(metrics));
    const bool last = state_.step == config_.train.steps;
    const auto due = [&](int64_t every) { return last || (every > 0 && state_.step % every == 0); };
    if (due(config_.eval.every)) evaluate();
    if (due(config_.checkpoint.every)) save();
    if (stop_requested(comm_) && !last) {
      save();
      say(fmt::format("stopped by a signal after step {}; continue with --resume", state_.step));
      return RunEnd::stopped;
    }
  }
  double peak = static_cast<double>(peak_held_bytes(device_));
  comm_.max(&peak, 1);
  say(fmt::format("done: {} steps, {} tokens; peak memory a rank {:.0f} MiB", state_.step, tokens(),
                  mib(static_cast<size_t>(peak))));
  return RunEnd::complete;
}

}  // namespace

RunEnd train(const RunConfig& config, bool resume, Comm& comm, Listener& listener) {
  // Once a process, of which a sweep is one; and before memory is measured, as BLAS takes buffers.
  static double rate = 0;
  together(comm, [&] {
    if (rate == 0) rate = MatmulRate(comm.device()).measure();
  });
  reset_peak_resident();
  std::optional<Run> run;
  together(comm, [&] { run.emplace(config, comm, listener, rate); });
  return run->train(resume);
}

}  // namespace entrain
