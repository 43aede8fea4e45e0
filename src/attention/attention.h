#pragma once
// What an attention method is. To add one: a file beside this with a subclass, a line in
// registry.cpp, a section in the README.
#include <memory>
#include <vector>

#include "attention/config.h"
#include "core/params.h"
#include "core/tape.h"
#include "kernels/kernels.h"

namespace entrain {

/// What a layer hands to its attention. q [B, Hq, N, D], k and v [B, Hkv, N, D] are views into one
/// packed projection, rotary positions applied; gradients likewise, each written once.
struct AttentionInput {
  Var q, k, v;
  std::vector<Var> params;  // those that params() asked for, in order
  Tensor read;              // f64 [Hkv, read_fields], see ReadField
};

class AttentionMethod {
 public:
  virtual ~AttentionMethod() = default;

  /// Parameters that one layer adds, named within "model.layers.{i}.self_attn.".
  virtual std::vector<ParamSpec> params(int64_t n_kv_head, int64_t head_dim) const = 0;

  /// Records attention; o [B, Hq, N, D] views the layer's output, which forward writes and whose
  /// gradient backward reads.
  virtual void record(Tape& tape, const AttentionInput& in, Var o) const = 0;

  /// The knob of sparsity that a controller may turn while training, or null.
  virtual double* gamma() { return nullptr; }
};

/// The names a config's `method` can have.
std::vector<const char*> attention_methods();

/// The method that config.method names. Throws Error with the known names.
std::unique_ptr<AttentionMethod> make_attention(const AttentionConfig& config);

}  // namespace entrain
