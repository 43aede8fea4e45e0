#pragma once
// The Llama-shaped decoder: pre-norm RMSNorm, rotary positions, grouped-query attention by any
// method, SwiGLU. Parameter names are Hugging Face's.
#include <functional>
#include <memory>

#include "attention/attention.h"
#include "core/params.h"
#include "core/tape.h"
#include "model/config.h"

namespace entrain {

/// What decoding one sequence keeps of its tokens.
struct DecoderCache {
  explicit DecoderCache(Device device) : memory(device) {}

  struct Layer {
    Tensor k, v;                    // [1, Hkv, tokens, D]
    std::vector<Tensor> projected;  // of the method's projections: those that are cached, or empty
    std::vector<Tensor> own;        // the method's, see AttentionMethod::cache()
  };

  int64_t capacity = 0;  // tokens
  int64_t tokens = 0;    // so far: the next goes there
  std::vector<Layer> layers;
  Arena memory;
};

class Decoder {
 public:
  /// Called in the backward pass with each stretch of gradients as soon as it is final.
  using GradsFinal = std::function<void(Tensor flat)>;

  Decoder(const ModelConfig& model, const AttentionConfig& attention, int64_t max_tokens,
          uint64_t seed, bool training, Device device, DType dtype = DType::f32, Shard shard = {});

  const ModelConfig& config() const { return config_; }
  Params& params() { return params_; }
  Device device() const { return params_.values().device; }
  DType dtype() const { return dtype_; }  // of activations
  AttentionMethod& attention() { return *attention_; }
  /// What attention has read since last cleared: f64 [n_layer, Hkv, read_fields].
  Tensor read() const { return read_; }
  /// How routing spread in evaluation, since last cleared: f64 [max_tokens, entropy_fields].
  Tensor entropy() const { return entropy_; }

  /// Records everything up to the final norm: tokens i32 [B, N] to [B N, d_model]. With a cache,
  /// B is 1 and they follow the tokens in it.
  Var hidden(Tape& tape, Tensor tokens, const GradsFinal& grads_final = {},
             DecoderCache* cache = nullptr);
  /// hidden() and the cross-entropy of each target, [B N]; when training, the gradient of
  /// scale * sum(loss) flows. The loss can be read after forward and after backward. predicted,
  /// i32 and shaped as targets, where given, gets the most likely token at each.
  Tensor loss(Tape& tape, Tensor tokens, Tensor targets, double scale,
              const GradsFinal& grads_final = {}, Tensor predicted = {});
  /// hidden() and the logits, [B N, vocab].
  Tensor logits(Tape& tape, Tensor tokens);

  /// Multiplications with weights forward, for a sequence of so many tokens.
  int64_t products(int64_t tokens) const;

  /// Caches of a sequence of up to so many tokens, no more than the decoder was made for.
  DecoderCache make_cache(int64_t tokens) const;
  /// Records decoding: tokens i32 [1, n] join those in the cache whenever the tape runs, which must
  /// have room for them. The logits [1, vocab] of what follows the last. The tape refers to the
  /// cache.
  Tensor decode(Tape& tape, Tensor tokens, DecoderCache& cache);

 private:
  Var layer(Tape& tape, int64_t index, Var x, int64_t B, int64_t N, const DecoderCache* cache);
  Var head() const;

  ModelConfig config_;
  DType dtype_;
  std::unique_ptr<AttentionMethod> attention_;
  std::vector<Projection> projections_;  // the method's, of each layer
  std::vector<ParamSpec> extra_;         // its other parameters
  Params params_;
  size_t params_per_layer_;
  Buffer rope_memory_, read_memory_, entropy_memory_;
  Tensor cos_sin_, read_, entropy_;
};

}  // namespace entrain
