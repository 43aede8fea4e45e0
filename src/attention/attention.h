#pragma once
// What an attention method is. To add one: a file beside this with a subclass, a line in
// registry.cpp, a section in the README.
#include <memory>
#include <vector>

#include "attention/config.h"
#include "attention/queries.h"
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
  bool cached = false;  // decoding needs its rows of all tokens
};

/// What a method keeps of a layer's earlier tokens while it decodes one sequence.
struct CacheSpec {
  Shape shape;  // [1, heads, rows, width]
  DType dtype;
};

/// What a layer hands to its attention. q [B, Hq, N, D], k and v [B, Hkv, N, D] are views into one
/// packed projection, rotary positions applied; gradients likewise, each written once. While
/// decoding, B is 1, there are no gradients, and k, v and the projections that are `cached` hold
/// the rows of all tokens up to the last query, with room for those to come.
struct AttentionInput {
  Var q, k, v;
  std::vector<Var> projected;      // those of projections(), in order: views [B, heads, N, width]
  std::vector<Var> params;         // those that params() asked for, in order
  Tensor read;                     // f64 [Hkv, read_fields], see ReadField
  Tensor entropy = {};             // f64 [N, entropy_fields], see EntropyField, or empty
  const int64_t* first = nullptr;  // as in Queries
  std::vector<Tensor> cache = {};  // while decoding: those of cache(), in order

  Queries queries() const { return {q.value[2], first}; }
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

  /// What decoding a sequence of up to so many tokens keeps in each layer, beside k, v and the
  /// projections that are `cached`; `real` is the type of activations.
  virtual std::vector<CacheSpec> cache(const HeadShape&, int64_t /*tokens*/, DType /*real*/) const {
    return {};
  }

  /// Records attention; o [B, Hq, N, D] views the layer's output, which forward writes and whose
  /// gradient backward reads. Decoding continues a sequence: forward also updates the cache.
  /// Returns the mask of the blocks that forward chooses, see BlockSet, or an empty tensor.
  virtual Tensor record(Tape& tape, const AttentionInput& in, Var o) const = 0;

  /// The knobs of sparsity that a controller or a schedule may turn while training, or null.
  virtual double* gamma() { return nullptr; }
  virtual double* alpha() { return nullptr; }
};

/// The names a config's `method` can have.
std::vector<const char*> attention_methods();

/// The method that config.method names. Throws Error with the known names.
std::unique_ptr<AttentionMethod> make_attention(const AttentionConfig& config);

}  // namespace entrain
