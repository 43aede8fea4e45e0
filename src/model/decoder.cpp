#include "model/decoder.h"

#include <cmath>

#include "core/mirror.h"
#include "ops/ops.h"

namespace entrain {
namespace {

std::string layer_prefix(int64_t i) {
  return fmt::format("model.layers.{}.", i);
}

/// Parameters of the decoder, in the order of the forward pass. Projections start as in GPT-2:
/// normal 0.02, those that write to the residual stream smaller by sqrt(2 n_layer).
std::vector<ParamSpec> decoder_params(const ModelConfig& c,
                                      const std::vector<Projection>& projections,
                                      const std::vector<ParamSpec>& extra) {
  const double std = 0.02, out_std = std / std::sqrt(2.0 * c.n_layer);
  const int64_t d = c.d_model, D = c.head_dim, f = c.d_ff, q = c.n_head * D, kv = c.n_kv_head * D;
  auto matrix = [](std::string name, int64_t out, int64_t in, double deviation) {
    return ParamSpec{std::move(name), {out, in}, deviation};
  };
  auto norm = [](std::string name, int64_t width) {
    return ParamSpec{.name = std::move(name), .shape = {width}, .init_mean = 1, .decay = false};
  };
  std::vector<ParamSpec> specs{matrix("model.embed_tokens.weight", c.vocab, d, std)};
  for (int64_t i = 0; i < c.n_layer; ++i) {
    const std::string p = layer_prefix(i);
    specs.push_back(norm(p + "input_layernorm.weight", d));
    specs.push_back(matrix(p + "self_attn.q_proj.weight", q, d, std));
    specs.push_back(matrix(p + "self_attn.k_proj.weight", kv, d, std));
    specs.push_back(matrix(p + "self_attn.v_proj.weight", kv, d, std));
    const std::string in_attention = p + "self_attn.";
    for (const Projection& x : projections) {  // after v_proj: all are one product
      specs.push_back(matrix(in_attention + x.name, x.heads * x.width, d, std));
      specs.back().adopt = x.adopt;
      if (!x.adopt.like.empty()) specs.back().adopt->like = in_attention + x.adopt.like;
    }
    for (const ParamSpec& x : extra) {
      specs.push_back(x);
      specs.back().name = in_attention + x.name;
    }
    specs.push_back(matrix(p + "self_attn.o_proj.weight", d, q, out_std));
    specs.push_back(norm(p + "post_attention_layernorm.weight", d));
    specs.push_back(matrix(p + "mlp.gate_proj.weight", f, d, std));
    specs.push_back(matrix(p + "mlp.up_proj.weight", f, d, std));
    specs.push_back(matrix(p + "mlp.down_proj.weight", d, f, out_std));
  }
  specs.push_back(norm("model.norm.weight", d));
  if (!c.tie_embeddings) specs.push_back(matrix("lm_head.weight", c.vocab, d, std));
  return specs;
}

/// Columns [first, first + count * width) of x [B, N, columns] as heads [B, count, N, width].
Tensor heads(Tensor x, int64_t first, int64_t count, int64_t width) {
  if (!x) return x;
  return x.slice(2, first, count * width).split(2, width).transpose(1, 2);
}

Var heads(Var x, int64_t first, int64_t count, int64_t width) {
  return {heads(x.value, first, count, width), heads(x.grad, first, count, width)};
}

Var view(Var x, Shape shape) {
  return {x.value.view(shape), x.grad ? x.grad.view(shape) : Tensor{}};
}

/// Records that new rows [1, H, n, width] join those in the cache, and gives it in their place.
Var append(Tape& tape, Var rows, Tensor cache, const int64_t* first) {
  tape.record("cache", {}, {}, [=, rows = rows.value](auto k) {
    k.copy_rows(rows, cache.slice(2, *first, rows[2]));
  });
  return {cache, {}};
}

HeadShape heads_of(const ModelConfig& c) {
  return {c.n_head, c.n_kv_head, c.head_dim};
}

}  // namespace

Decoder::Decoder(const ModelConfig& model, const AttentionConfig& attention, int64_t max_tokens,
                 uint64_t seed, bool training, Device device, DType dtype, Shard shard)
    : config_(model),
      dtype_(dtype),
      attention_(make_attention(attention)),
      projections_(attention_->projections(heads_of(model))),
      extra_(attention_->params(heads_of(model))),
      params_(decoder_params(model, projections_, extra_), seed, training, device, dtype, shard),
      params_per_layer_(9 + projections_.size() + extra_.size()) {
  const auto make = [&](Buffer& memory, Shape shape, DType type) {
    memory = Buffer(static_cast<size_t>(shape.numel()) * size_of(type), device);
    return Tensor::of(memory.data(), shape, type, device);
  };
  cos_sin_ = make(rope_memory_, {max_tokens, model.head_dim}, params_.values().dtype);
  read_ = make(read_memory_, {model.n_layer, model.n_kv_head, read_fields}, DType::f64);
  entropy_ = make(entropy_memory_, {max_tokens, entropy_fields}, DType::f64);
  Mirror cos_sin(cos_sin_);
  ops::rope_table(cos_sin.host(), model.rope_theta);
  cos_sin.upload();
}

Var Decoder::layer(Tape& tape, int64_t index, Var x, int64_t B, int64_t N,
                   const DecoderCache* cache) {
  const std::string p = layer_prefix(index);
  const int64_t Hq = config_.n_head, Hkv = config_.n_kv_head, D = config_.head_dim;
  auto weight = [&](const char* name) { return params_.get(p + name).var(); };
  auto packed = [&](const char* first, size_t count) {
    return params_.packed(p + first, static_cast<int>(count)).var();
  };

  Var h = ops::rmsnorm(tape, x, weight("input_layernorm.weight"), config_.norm_eps);
  Var qkv = ops::linear(tape, h, packed("self_attn.q_proj.weight", 3 + projections_.size()));
  qkv = view(qkv, {B, N, qkv.value[1]});
  AttentionInput in{.q = heads(qkv, 0, Hq, D),
                    .k = heads(qkv, Hq * D, Hkv, D),
                    .v = heads(qkv, (Hq + Hkv) * D, Hkv, D),
                    .projected = {},
                    .params = {},
                    .read = read_.slice(0, index, 1).view({Hkv, read_fields}),
                    .entropy = tape.training() || cache ? Tensor{} : entropy_,
                    .first = cache ? &cache->tokens : nullptr};
  ops::rope(tape, heads(qkv, 0, Hq + Hkv, D), cos_sin_, in.first);
  int64_t column = (Hq + 2 * Hkv) * D;
  for (const Projection& x : projections_) {
    in.projected.push_back(heads(qkv, column, x.heads, x.width));
    if (x.rotary) ops::rope(tape, in.projected.back(), cos_sin_, in.first);
    column += x.heads * x.width;
  }
  for (const ParamSpec& spec : extra_) {
    in.params.push_back(weight(("self_attn." + spec.name).c_str()));
  }
  if (cache) {
    const DecoderCache::Layer& kept = cache->layers[static_cast<size_t>(index)];
    in.k = append(tape, in.k, kept.k, in.first);
    in.v = append(tape, in.v, kept.v, in.first);
    for (size_t i = 0; i < projections_.size(); ++i) {
      Var& x = in.projected[i];
      if (projections_[i].cached) x = append(tape, x, kept.projected[i], in.first);
    }
    in.cache = kept.own;
  }
  const Var o = tape.var({B * N, Hq * D});
  tape.scope("attention", [&] {
    attention_->record(tape, in, heads(view(o, {B, N, Hq * D}), 0, Hq, D));
  });
  x = ops::add_linear(tape, x, o, weight("self_attn.o_proj.weight"));

  h = ops::rmsnorm(tape, x, weight("post_attention_layernorm.weight"), config_.norm_eps);
  h = ops::swiglu(tape, ops::linear(tape, h, packed("mlp.gate_proj.weight", 2)));
  return ops::add_linear(tape, x, h, weight("mlp.down_proj.weight"));
}

Var Decoder::head() const {
  return params_.get(config_.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight").var();
}

Var Decoder::hidden(Tape& tape, Tensor tokens, const GradsFinal& grads_final, DecoderCache* cache) {
  const int64_t B = tokens[0], N = tokens[1];
  require(N <= cos_sin_[0], "{} tokens a sequence; the decoder was made for {}", N, cos_sin_[0]);
  // Gradients of parameters [first, first + count) are final once backward is past this point.
  auto announce = [&](size_t first, size_t count) {
    if (!grads_final) return;
    const Tensor grads = params_.grads(first, count);
    tape.after_backward([=] { grads_final(grads); });
  };
  announce(0, 1);
  Var x =
      ops::embedding(tape, tokens.view({B * N}), params_.get("model.embed_tokens.weight").var());
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    announce(1 + static_cast<size_t>(i) * params_per_layer_, params_per_layer_);
    x = tape.block(fmt::format("layers.{}", i), x,
                   [&](Var in) { return layer(tape, i, in, B, N, cache); });
  }
  announce(1 + static_cast<size_t>(config_.n_layer) * params_per_layer_,
           config_.tie_embeddings ? 1 : 2);
  return ops::rmsnorm(tape, x, params_.get("model.norm.weight").var(), config_.norm_eps);
}

Tensor Decoder::loss(Tape& tape, Tensor tokens, Tensor targets, double scale,
                     const GradsFinal& grads_final, Tensor predicted) {
  // Kept below the blocks: what comes after them is overwritten when backward recomputes them.
  const Tensor loss = tape.keep({targets.numel()}, tape.sum_dtype());
  const Var x = hidden(tape, tokens, grads_final);
  ops::head_loss(tape, x, head(), targets.view({targets.numel()}), scale, loss,
                 predicted ? predicted.view({predicted.numel()}) : Tensor{});
  return loss;
}

Tensor Decoder::logits(Tape& tape, Tensor tokens) {
  return ops::linear(tape, hidden(tape, tokens), head()).value;
}

int64_t Decoder::products(int64_t tokens) const {
  const ModelConfig& c = config_;
  int64_t rows = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim + 3 * c.d_ff;  // of d_model weights
  for (const Projection& x : projections_) rows += x.heads * x.width;
  const int64_t a_token = (c.n_layer * rows + c.vocab) * c.d_model;
  return tokens * a_token + c.n_layer * attention_->products(heads_of(c), tokens);
}

DecoderCache Decoder::make_cache(int64_t tokens) const {
  require(tokens <= cos_sin_[0], "a cache of {} tokens; the decoder was made for {}", tokens,
          cos_sin_[0]);
  DecoderCache cache(device());
  const auto rows = [&](int64_t heads, int64_t width) {
    return cache.memory.alloc({1, heads, tokens, width}, dtype_);
  };
  for (const bool committed : {false, true}) {
    if (committed) cache.memory.commit();
    cache.layers.clear();
    for (int64_t i = 0; i < config_.n_layer; ++i) {
      DecoderCache::Layer& layer = cache.layers.emplace_back();
      layer.k = rows(config_.n_kv_head, config_.head_dim);
      layer.v = rows(config_.n_kv_head, config_.head_dim);
      for (const Projection& x : projections_) {
        layer.projected.push_back(x.cached ? rows(x.heads, x.width) : Tensor{});
      }
      for (const CacheSpec& x : attention_->cache(heads_of(config_), tokens, dtype_)) {
        layer.own.push_back(cache.memory.alloc(x.shape, x.dtype));
      }
    }
  }
  cache.capacity = tokens;
  return cache;
}

Tensor Decoder::decode(Tape& tape, Tensor tokens, DecoderCache& cache) {
  const int64_t n = tokens[1];
  Var last = hidden(tape, tokens, {}, &cache);
  last.value = last.value.slice(0, n - 1, 1);
  tape.record("tokens", {}, {}, [&cache, n] { cache.tokens += n; });
  return ops::linear(tape, last, head()).value;
}

}  // namespace entrain
