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

struct HeadShape {
  int64_t n_head, n_kv_head, head_dim;
};

/// A linear map of the layer's normalised input beside q_proj, k_proj and v_proj, in one product
/// with them.
struct Projection {
  std::string name;  // within "model.layers.{i}.self_attn."
  int64_t heads, width;
  bool rotary = false;  // rotary positions are applied; width is head_dim
  Adopt adopt;          // `like` names another within self_attn
};

/// What a layer hands to its attention. q [B, Hq, N, D], k and v [B, Hkv, N, D] are views into one
/// packed projection, rotary positions applied; gradients likewise, each written once.
struct AttentionInput {
  Var q, k, v;
  std::vector<Var> projected;  // those of projections(), in order: views [B, heads, N, width]
  std::vector<Var> params;     // those that params() asked for, in order
  Tensor read;                 // f64 [Hkv, read_fields], see ReadField
  Tensor entropy = {};         // f64 [N, entropy_fields], see EntropyField, or empty
};

class AttentionMethod {
 public:
  virtual ~AttentionMethod() = default;

  /// What the method wants projected from the layer's input beside q, k and v.
  virtual std::vector<Projection> projections(const HeadShape&) const { return {}; }

  /// Parameters that one layer adds, named within "model.layers.{i}.self_attn.".
  virtual std::vector<ParamSpec> params(const HeadShape&) const { return {}; }

  /// Multiplications forward with the weights among params(), for a sequence of so many tokens.
  virtual int64_t products(const HeadShape&, int64_t) const { return 0; }

  /// Records attention; o [B, Hq, N, D] views the layer's output, which forward writes and whose
  /// gradient backward reads.
  virtual void record(Tape& tape, const AttentionInput& in, Var o) const = 0;

  /// The knobs of sparsity that a controller or a schedule may turn while training, or null.
  virtual double* gamma() { return nullptr; }
  virtual double* alpha() { return nullptr; }
};

/// The names a config's `method` can have.
std::vector<const char*> attention_methods();

/// The method that config.method names. Throws Error with the known names.
std::unique_ptr<AttentionMethod> make_attention(const AttentionConfig& config);

}  // namespace entrain
