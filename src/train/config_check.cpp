// What a configuration must satisfy beyond the type of each value.
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "attention/attention.h"
#include "attention/compression.h"
#include "train/config.h"

namespace entrain {
namespace {

// Every refusal names the key to look at first; load_config turns it into file and line.
template <class... Args>
void require_key(bool ok, const char* key, fmt::format_string<Args...> format, Args&&... args) {
  if (ok) return;
  throw ConfigError(fmt::format("{} {}", key, fmt::format(format, std::forward<Args>(args)...)),
                    key);
}

template <class T>
void at_least(T low, const char* key, T value) {
  require_key(value >= low, key, "must be at least {}, not {}", low, value);
}

void positive(const char* key, double value) {
  require_key(value > 0.0, key, "must be greater than 0, not {}", value);
}

/// Beyond that, thresholds within 1 of scores could not be told from them in float32, and rows
/// would route nowhere.
void routable(const char* key, double gamma) {
  constexpr double largest = 1e6;
  positive(key, gamma);
  require_key(gamma <= largest, key, "must be at most {}, not {}", largest, gamma);
}

void one_of(const std::vector<const char*>& names, const char* key, const std::string& value) {
  require_key(std::ranges::find(names, value) != names.end(), key, "must be {}, not '{}'",
              fmt::join(names, " or "), value);
}

// "248 or 256": the multiples of `unit` around a value.
std::string nearest_multiples(int64_t value, int64_t unit) {
  const int64_t below = value / unit * unit;
  return below == 0 ? fmt::format("{}", unit) : fmt::format("{} or {}", below, below + unit);
}

// "2 or 4": the divisors of `whole` around a value.
std::string nearest_divisors(int whole, int value) {
  int below = std::min(value, whole), above = below;
  while (whole % below != 0) --below;
  while (whole % above != 0) ++above;
  return below == above ? fmt::format("{}", below) : fmt::format("{} or {}", below, above);
}

void check_model(const ModelConfig& m) {
  at_least(1, "model.n_layer", m.n_layer);
  at_least(1, "model.d_model", m.d_model);
  at_least(1, "model.n_head", m.n_head);
  at_least(1, "model.n_kv_head", m.n_kv_head);
  at_least(1, "model.d_ff", m.d_ff);
  require_key(m.n_head % m.n_kv_head == 0, "model.n_kv_head",
              "{} does not divide model.n_head {}; nearest that do: {}", m.n_kv_head, m.n_head,
              nearest_divisors(m.n_head, m.n_kv_head));
  // Heads have a width of their own, so the mathematics would not mind; Hugging Face's Llama does.
  require_key(m.d_model % m.n_head == 0, "model.d_model",
              "{} is not divisible by model.n_head {}; nearest that are: {}", m.d_model, m.n_head,
              nearest_multiples(m.d_model, m.n_head));
  at_least(2, "model.head_dim", m.head_dim);
  require_key(m.head_dim <= 256, "model.head_dim", "must be at most 256, not {}", m.head_dim);
  require_key(m.head_dim % 2 == 0, "model.head_dim",
              "{} is odd and rotary embedding turns pairs; nearest that are even: {}", m.head_dim,
              nearest_multiples(m.head_dim, 2));
  positive("model.rope_theta", m.rope_theta);
  positive("model.norm_eps", m.norm_eps);
}

// Queries route at least one chunk, and one for each head of a group where the heads disagree,
// however large gamma is; forced chunks come on top. A query has seq_len / 2 tokens on average.
void check_target_density(const RunConfig& c) {
  constexpr const char* key = "attention.target_density";
  const double target = c.attention.target_density;
  if (target == 0.0) return;
  require_key(target > 0.0 && target <= 1.0, key, "must be in (0, 1], or 0 for none, not {}",
              target);
  require_key(c.attention.method == "dash", key,
              "needs attention.method dash: {} attention has no gamma to drive",
              c.attention.method);
  require_key(c.attention.alpha > 1.0, key,
              "needs attention.alpha above 1: softmax routes to every chunk");
  require_key(c.attention.alpha_steps == 0 || c.attention.alpha_start > 1.0, key,
              "needs attention.alpha_start above 1: softmax routes to every chunk");

  const int group = c.model.n_head / c.model.n_kv_head;
  const double chunks = double(group) + c.attention.local_blocks + c.attention.init_blocks;
  const double floor = std::min(1.0, chunks * c.attention.chunk / (c.data.seq_len / 2.0));
  const double chunk = std::floor(target * c.data.seq_len / 2.0 / chunks);
  const double seq_len = std::ceil(2.0 * chunks * c.attention.chunk / target);
  require_key(
      target >= floor, key, "{} is below the floor of about {:.3f}; {}take data.seq_len {} or more",
      target, std::ceil(floor * 1000.0) / 1000.0,
      chunk >= 1.0 ? fmt::format("take attention.chunk {} or less, or ", chunk) : "", seq_len);
}

void check_attention(const AttentionConfig& a) {
  one_of(attention_methods(), "attention.method", a.method);
  at_least(1, "attention.chunk", a.chunk);
  require_key(a.alpha >= 1.0 && a.alpha <= 2.0, "attention.alpha",
              "must be from 1 (softmax) to 2 (sparsemax), not {}", a.alpha);
  routable("attention.gamma", a.gamma);
  at_least(0, "attention.alpha_steps", a.alpha_steps);
  at_least(0, "attention.gamma_steps", a.gamma_steps);
  require_key(a.alpha_start >= 1.0 && a.alpha_start <= 2.0, "attention.alpha_start",
              "must be from 1 (softmax) to 2 (sparsemax), not {}", a.alpha_start);
  routable("attention.gamma_start", a.gamma_start);
  require_key(a.gamma_steps == 0 || a.target_density == 0.0, "attention.gamma_steps",
              "and attention.target_density both drive gamma; take one of them");
  one_of({"learned", "mean"}, "attention.summaries", a.summaries);
  one_of({"entmax", "softmax"}, "attention.aggregation", a.aggregation);
  positive("attention.sigma", a.sigma);
  at_least(0.0, "attention.prior_eps", a.prior_eps);
  at_least(0, "attention.init_blocks", a.init_blocks);
  at_least(1, "attention.local_blocks", a.local_blocks);
  at_least(1, "attention.block", a.block);
  at_least(1, "attention.topk", a.topk);
  at_least(1, "attention.l", a.l);
  at_least(1, "attention.d", a.d);
  const int64_t forced = int64_t{a.init_blocks} + a.local_blocks;
  const bool nsa = a.method == "nsa";
  require_key(!(nsa || a.method == "infllmv2") || a.topk >= forced, "attention.topk",
              "{} is less than the forced blocks, attention.init_blocks {} and "
              "attention.local_blocks {}; take {} or more",
              a.topk, a.init_blocks, a.local_blocks, forced);
  at_least(1, "attention.window", a.window);
  one_of(Compression::kinds(), "attention.compression", a.compression);
  for (const auto& [key, value] : {std::pair{"attention.l", a.l}, {"attention.block", a.block}}) {
    require_key(
        !nsa || value % a.d == 0, key,
        "{} is not a multiple of attention.d {}, as NSA's scores need; nearest that are: {}", value,
        a.d, nearest_multiples(value, a.d));
  }
}

void check_optim(const OptimConfig& o, int64_t steps) {
  positive("train.lr", o.lr);
  at_least(0, "train.warmup", o.warmup);
  require_key(o.warmup < steps, "train.warmup", "{} must be less than train.steps {}", o.warmup,
              steps);
  one_of({"cosine", "linear", "constant"}, "train.schedule", o.schedule);
  at_least(0.0, "train.min_lr", o.min_lr);
  require_key(o.min_lr <= o.lr, "train.min_lr", "{} must be at most train.lr {}", o.min_lr, o.lr);
  require_key(o.beta1 >= 0.0 && o.beta1 < 1.0, "train.beta1", "must be in [0, 1), not {}", o.beta1);
  require_key(o.beta2 >= 0.0 && o.beta2 < 1.0, "train.beta2", "must be in [0, 1), not {}", o.beta2);
  positive("train.eps", o.eps);
  at_least(0.0, "train.weight_decay", o.weight_decay);
  at_least(0.0, "train.clip", o.clip);
}

void check_train(const TrainConfig& t) {
  at_least(int64_t{1}, "train.steps", t.steps);
  at_least(1, "train.global_batch", t.global_batch);
  at_least(1, "train.micro_batch", t.micro_batch);
  require_key(t.micro_batch <= t.global_batch, "train.micro_batch",
              "{} must be at most train.global_batch {}", t.micro_batch, t.global_batch);
  at_least(1, "train.log_every", t.log_every);
  check_optim(t.optim, t.steps);
}

void check_paths(const RunConfig& c) {
  require_key(!c.data.path.empty(), "data.path", "is empty; name a token store");
  require_key(!c.dir.empty(), "run.dir", "is empty; name a folder");
  one_of({"auto", "cpu", "cuda"}, "run.device", c.device);
  one_of({"auto", "f32", "bf16"}, "run.dtype", c.dtype);
  const auto same = [](const std::string& a, const std::string& b) {
    return std::filesystem::path(a).lexically_normal() ==
           std::filesystem::path(b).lexically_normal();
  };
  require_key(!same(c.train.init_from, c.dir), "train.init_from",
              "is the run's own folder; continue it with --resume");
}

}  // namespace

void check(const RunConfig& c) {
  check_model(c.model);
  check_attention(c.attention);
  at_least(2, "data.seq_len", c.data.seq_len);
  at_least(int64_t{0}, "data.skip", c.data.skip);
  check_target_density(c);
  check_train(c.train);
  at_least(int64_t{0}, "checkpoint.every", c.checkpoint.every);
  at_least(0, "checkpoint.keep", c.checkpoint.keep);
  at_least(int64_t{0}, "eval.every", c.eval.every);
  at_least(1, "eval.sequences", c.eval.sequences);
  check_paths(c);
}

}  // namespace entrain
