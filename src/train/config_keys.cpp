#include "train/config_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#include "core/edit_distance.h"

namespace entrain {

std::vector<Key> keys_of(RunConfig& c) {
  constexpr bool required = true;
  OptimConfig& optim = c.train.optim;
  return {
      {"model.n_layer", &c.model.n_layer, "decoder blocks", required},
      {"model.d_model", &c.model.d_model, "width of the residual stream", required},
      {"model.n_head", &c.model.n_head, "query heads", required},
      {"model.n_kv_head", &c.model.n_kv_head, "key-value heads; divides n_head", required},
      {"model.head_dim", &c.model.head_dim, "width of a head; even, at most 256", required},
      {"model.d_ff", &c.model.d_ff, "width inside the feed-forward (SwiGLU)", required},
      {"model.rope_theta", &c.model.rope_theta, "base of the rotary embedding"},
      {"model.norm_eps", &c.model.norm_eps, "added to the mean square in RMSNorm"},
      {"model.tie_embeddings", &c.model.tie_embeddings, "output head shares the embedding"},

      {"attention.method", &c.attention.method, "full | dash | nsa | infllmv2"},
      {"attention.chunk", &c.attention.chunk, "tokens in a key-value chunk"},
      {"attention.alpha", &c.attention.alpha, "entmax of the router: 1 softmax .. 2 sparsemax"},
      {"attention.gamma", &c.attention.gamma, "scale of routing scores; larger is sparser"},
      {"attention.sigma", &c.attention.sigma, "temperature of the prior; larger tilts less"},
      {"attention.prior_eps", &c.attention.prior_eps, "added to routing weights in the logarithm"},
      {"attention.center", &c.attention.center, "subtract the mean log weight of the support"},
      {"attention.init_blocks", &c.attention.init_blocks,
       "first chunks or blocks every query attends; NSA and InfLLM-V2 have 1"},
      {"attention.local_blocks", &c.attention.local_blocks,
       "last ones, the own included, every query attends; NSA and InfLLM-V2 have 2"},
      {"attention.block", &c.attention.block, "nsa, infllmv2: tokens in a block; papers: 64"},
      {"attention.topk", &c.attention.topk,
       "nsa, infllmv2: blocks of a query, forced ones included; papers: 16"},
      {"attention.l", &c.attention.l,
       "nsa, infllmv2: tokens in a window of compressed or pooled keys; papers: 32"},
      {"attention.d", &c.attention.d,
       "nsa, infllmv2: tokens from one window to the next; papers: 16"},
      {"attention.window", &c.attention.window,
       "nsa: last tokens that every query attends; paper: 512"},
      {"attention.compression", &c.attention.compression,
       "nsa: mlp | linear | mean, from a window's keys and values to one"},
      {"attention.target_density", &c.attention.target_density,
       "drive gamma to this share of tokens attended; 0: keep gamma"},
      {"attention.alpha_start", &c.attention.alpha_start,
       "alpha at the first step, where alpha_steps > 0; the paper: 1.25"},
      {"attention.alpha_steps", &c.attention.alpha_steps,
       "steps in which alpha goes linearly from alpha_start to alpha; 0: it stays"},
      {"attention.gamma_start", &c.attention.gamma_start,
       "gamma at the first step, where gamma_steps > 0"},
      {"attention.gamma_steps", &c.attention.gamma_steps,
       "steps in which gamma goes linearly from gamma_start to gamma; 0: it stays"},
      {"attention.summaries", &c.attention.summaries,
       "dash, ablation: learned | mean summaries of chunks"},
      {"attention.aggregation", &c.attention.aggregation,
       "dash, ablation: entmax | softmax of each head before a group's mean (entmax after it)"},
      {"attention.router_gradient", &c.attention.router_gradient,
       "dash, ablation: false cuts the gradient from the token softmax to the router"},

      {"data.path", &c.data.path, "token store, from entrain tokenize", required},
      {"data.seq_len", &c.data.seq_len, "tokens in a sequence", required},
      {"data.skip", &c.data.skip,
       "sequences of the shuffled training data to pass over at the start"},

      {"train.steps", &c.train.steps, "optimizer steps", required},
      {"train.global_batch", &c.train.global_batch, "sequences a step sees, over all ranks",
       required},
      {"train.micro_batch", &c.train.micro_batch, "sequences a rank holds at once", required},
      {"train.lr", &optim.lr, "learning rate at its peak"},
      {"train.warmup", &optim.warmup, "steps of linear rise from 0"},
      {"train.schedule", &optim.schedule, "cosine | linear | constant, after warm-up"},
      {"train.min_lr", &optim.min_lr, "learning rate at the last step"},
      {"train.beta1", &optim.beta1, "AdamW: decay of the first moment"},
      {"train.beta2", &optim.beta2, "AdamW: decay of the second moment"},
      {"train.eps", &optim.eps, "AdamW: added to the root of the second moment"},
      {"train.weight_decay", &optim.weight_decay, "AdamW: decay of matrices"},
      {"train.clip", &optim.clip, "largest global gradient norm; 0: none"},
      {"train.seed", &c.train.seed, "of initial weights and of the order of sequences"},
      {"train.init_from", &c.train.init_from, "run folder or checkpoint to take parameters from"},
      {"train.recompute", &c.train.recompute, "less memory: recompute activations in backward"},
      {"train.shard_optimizer", &c.train.shard_optimizer,
       "less memory: each rank keeps a part of AdamW's moments (ZeRO-1)"},
      {"train.log_every", &c.train.log_every, "steps between console lines"},

      {"checkpoint.every", &c.checkpoint.every, "steps; 0: only at the end and on signals"},
      {"checkpoint.keep", &c.checkpoint.keep, "newest ones kept; 0: all"},

      {"eval.every", &c.eval.every, "steps; 0: only at the end"},
      {"eval.sequences", &c.eval.sequences, "sequences of the validation split"},

      {"run.dir", &c.dir, "folder of everything the run writes", required},
      {"run.device", &c.device, "auto | cpu | cuda; auto: the GPU where there is one"},
      {"run.dtype", &c.dtype, "of activations: auto | f32 | bf16; auto: bf16 on the GPU"},
  };
}

const Key* find_key(const std::vector<Key>& keys, std::string_view name) {
  const auto found = std::ranges::find(keys, name, &Key::name);
  return found == keys.end() ? nullptr : &*found;
}

namespace {

std::vector<std::string_view> words_of(std::string_view name) {
  std::vector<std::string_view> words;
  while (!name.empty()) {
    const size_t end = std::min(name.find('_'), name.size());
    words.push_back(name.substr(0, end));
    name.remove_prefix(std::min(end + 1, name.size()));
  }
  return words;
}

// Letters of difference, except that a long form is near its short one: learning_rate and lr (its
// initials), warmup_steps and warmup (some of its words).
double leaf_distance(std::string_view unknown, std::string_view leaf) {
  const double letters = static_cast<double>(edit_distance(unknown, leaf));
  const std::vector<std::string_view> words = words_of(unknown);
  std::string initials;
  for (const std::string_view word : words) initials += word.substr(0, 1);
  if (words.size() > 1 && initials == leaf) return 1.0;
  const bool contained = std::ranges::all_of(words_of(leaf), [&](std::string_view word) {
    return std::ranges::find(words, word) != words.end();
  });
  return contained ? std::min(letters, 1.0 + 0.01 * letters) : letters;
}

// Beyond this many letters a name resembles nothing.
double reach(std::string_view name) {
  return 1.0 + static_cast<double>(name.size()) / 3.0;
}

std::vector<std::string_view> sections_of(const std::vector<Key>& keys) {
  std::vector<std::string_view> sections;
  for (const Key& key : keys) {
    if (sections.empty() || sections.back() != key.section()) sections.push_back(key.section());
  }
  return sections;
}

}  // namespace

std::string suggest_key(const std::vector<Key>& keys, std::string_view unknown) {
  const size_t dot = unknown.find('.');
  const std::string_view section = dot == unknown.npos ? "" : unknown.substr(0, dot);
  const std::string_view leaf = dot == unknown.npos ? unknown : unknown.substr(dot + 1);

  // The section decides between keys whose names are as near.
  const auto distance = [&](const Key& key) {
    return leaf_distance(leaf, key.leaf()) +
           0.1 * static_cast<double>(edit_distance(section, key.section()));
  };
  const Key& nearest = *std::ranges::min_element(keys, {}, distance);
  if (leaf_distance(leaf, nearest.leaf()) <= reach(leaf)) {
    return fmt::format("did you mean {}?", nearest.name);
  }
  std::vector<std::string_view> leaves;
  for (const Key& key : keys) {
    if (key.section() == section) leaves.push_back(key.leaf());
  }
  if (leaves.empty()) return suggest_section(keys, section);
  return fmt::format("{} has {}", section, fmt::join(leaves, ", "));
}

std::string suggest_section(const std::vector<Key>& keys, std::string_view unknown) {
  const std::vector<std::string_view> sections = sections_of(keys);
  const auto distance = [&](std::string_view section) {
    return static_cast<double>(edit_distance(unknown, section));
  };
  const std::string_view nearest = *std::ranges::min_element(sections, {}, distance);
  if (distance(nearest) <= reach(unknown)) return fmt::format("did you mean {}?", nearest);
  return fmt::format("sections are {}", fmt::join(sections, ", "));
}

namespace {

// The whole text as one finite number; a sign may be + too.
std::optional<double> parse_double(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return {};
  return value;
}

std::string set(double& to, const std::string& text) {
  const std::optional<double> value = parse_double(text);
  if (!value) return "must be a finite number";
  to = *value;
  return "";
}

// Decimal digits, or a number such as 1e6 that is whole and exact in a double.
template <class Integer>
requires std::is_integral_v<Integer> std::string set(Integer& to, const std::string& text) {
  Integer value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) {
    to = value;
    return "";
  }
  const std::optional<double> number = parse_double(text);
  if (!number || std::trunc(*number) != *number) return "must be a whole number";
  using Limits = std::numeric_limits<Integer>;
  const bool exact = std::abs(*number) <= 0x1.0p53;
  if (!exact || *number < static_cast<double>(Limits::min()) ||
      *number > static_cast<double>(Limits::max())) {
    return fmt::format("must be from {} to {}", Limits::min(), Limits::max());
  }
  to = static_cast<Integer>(*number);
  return "";
}

std::string set(bool& to, const std::string& text) {
  if (text != "true" && text != "false") return "must be true or false";
  to = text == "true";
  return "";
}

std::string set(std::string& to, const std::string& text) {
  to = text;
  return "";
}

std::string text(const std::string& value) {
  return value;
}
std::string text(bool value) {
  return value ? "true" : "false";
}

// The shortest digits that give the same double. Readers of YAML 1.1 take 1e-08 for a string, hence
// the point.
std::string text(double value) {
  std::string digits = fmt::format("{}", value);
  const size_t exponent = digits.find('e');
  if (exponent != digits.npos && digits.find('.') == digits.npos) digits.insert(exponent, ".0");
  return digits;
}

template <class Integer>
requires std::is_integral_v<Integer> std::string text(Integer value) {
  return fmt::format("{}", value);
}

}  // namespace

std::string assign(const Field& field, const std::string& text) {
  return std::visit([&](auto* to) { return set(*to, text); }, field);
}

std::string text_of(const Field& field) {
  return std::visit([](const auto* from) { return text(*from); }, field);
}

std::string describe_keys() {
  RunConfig defaults;
  std::string lines;
  for (const Key& key : keys_of(defaults)) {
    const std::string value = text_of(key.field);
    lines += fmt::format("  {:<25} {:<10} {}\n", key.name,
                         key.required    ? "required"
                         : value.empty() ? "none"
                                         : value,
                         key.help);
  }
  return lines;
}

}  // namespace entrain
