// Causal softmax attention over every key.
#include "attention/registry.h"

namespace entrain {
namespace {

class FullAttention : public AttentionMethod {
 public:
  void record(Tape& tape, const AttentionInput& in, Var o) const override {
    const Kernels<Device::cpu> kernels;
    const Var q = in.q, k = in.k, v = in.v;
    const BlockSet every_block;
    const Tensor lse = tape.keep({q.value[0], q.value[1], q.value[2]});
    const Tensor keys = tape.scratch(k.value.shape);
    Tensor scratch;
    if (tape.training()) {
      scratch = tape.scratch({kernels.attention_backward_scratch(q.value.shape, k.value.shape)});
    }
    tape.record(
        "attention", o.value, q.grad,
        [=, read = in.read] {
          kernels.attention(q.value, k.value, v.value, every_block, o.value, lse, keys, read);
        },
        [=] {
          kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, every_block,
                                     q.grad, k.grad, v.grad, {}, scratch);
        },
        {k.grad, v.grad});
  }
};

}  // namespace

std::unique_ptr<AttentionMethod> make_full_attention(const AttentionConfig&) {
  return std::make_unique<FullAttention>();
}

}  // namespace entrain
