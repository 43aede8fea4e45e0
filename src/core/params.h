#pragma once
// All parameters of a model in four flat buffers (values, gradients, both moments), so that
// clipping, AdamW and communication run over a few long vectors. A Param is a named window into
// values and gradients. Where activations are bf16, a fifth holds the values rounded, which
// products read. Moments may be kept in shards, one a rank (ZeRO-1, Rajbhandari et al. 2020).
#include <optional>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/tape.h"
#include "core/tensor.h"

namespace entrain {

/// How a parameter starts in a model that takes its others from a checkpoint without this one.
struct Adopt {
  std::string like;  // as this parameter of the checkpoint; if empty:
  double value = 0;  // this everywhere
};

struct Param {
  std::string name;            // Hugging Face's Llama name
  Tensor value;                // f32 where activations are bf16, otherwise their type
  Tensor rounded;              // bf16, for matrices where activations are; otherwise empty
  Tensor grad;                 // accumulated with +=, cleared by the optimizer
  int64_t begin = 0;           // its first element in the flat buffers
  bool decay = true;           // weight decay applies
  std::optional<Adopt> adopt;  // none: it starts as in any new model

  Var var() const { return {rounded ? rounded : value, grad}; }
};

/// What to create: shape and how it starts.
struct ParamSpec {
  std::string name;
  Shape shape;
  double init_std = 0.0;  // normal with this deviation
  double init_mean = 0.0;
  bool decay = true;
  std::optional<Adopt> adopt = {};
};

/// Which of so many equal parts of the moments this is; the only one: all.
struct Shard {
  int index = 0;
  int count = 1;
};

class Params {
 public:
  /// Creates all parameters in order, each initialised from (seed, its name), so that models that
  /// share a name and shape share the values. Without moments where training is not wanted. dtype:
  /// of activations.
  Params(const std::vector<ParamSpec>& specs, uint64_t seed, bool training, Device device,
         DType dtype = DType::f32, Shard shard = {});

  const std::vector<Param>& all() const { return params_; }
  std::vector<Param>& all() { return params_; }
  const Param& get(const std::string& name) const;  // throws Error
  /// A window over `count` parameters [out_i, in] that were created one after the other, as one
  /// matrix [sum out_i, in]: q, k and v (gate and up) are multiplied in one product.
  Param packed(const std::string& first, int count) const;

  int64_t numel() const { return numel_; }
  size_t bytes() const;                      // of all buffers
  Tensor values() const { return values_; }  // flat, with gaps of zeros
  Tensor grads() const { return grads_; }
  /// The gradients of parameters [first, first + count), in order of creation, as one flat tensor.
  Tensor grads(size_t first, size_t count) const;
  Tensor m() const { return m_; }  // AdamW's first and second moment, of the shard
  Tensor v() const { return v_; }
  Tensor decays() const { return decays_; }    // u8: 1 where weight decay applies
  Tensor rounded() const { return rounded_; }  // flat, or empty
  /// Rounds the values again: after they were written by others than AdamW.
  void round();

  const Shard& shard() const { return shard_; }
  /// Where a shard begins in the flat buffers; one past the last: where they end.
  int64_t shard_begin(int index) const;
  /// The shard of a flat buffer (or empty).
  Tensor of_shard(const Tensor& flat) const;
  /// The values with a shard in each row, of which the last reaches into padding.
  Tensor shards() const;

 private:
  Shard shard_;
  int64_t shard_length_ = 0;
  Buffer memory_[4], decays_memory_, rounded_memory_;
  Tensor values_, grads_, m_, v_, decays_, rounded_;
  std::vector<Param> params_;
  int64_t numel_ = 0;
};

}  // namespace entrain
