#include "attention/record_attention.h"

namespace entrain {

void record_attention(Tape& tape, const AttentionInput& in, const BlockSet& blocks, Tensor dbias,
                      Var o) {
  const Kernels<Device::cpu> kernels;
  const Var q = in.q, k = in.k, v = in.v;
  const Queries queries = in.queries();
  const Tensor lse = tape.keep({q.value[0], q.value[1], q.value[2]});
  const Tensor keys = queries.decoding() ? Tensor{} : tape.scratch(k.value.shape);
  Tensor scratch;
  if (tape.training()) {
    scratch = tape.scratch({kernels.attention_backward_scratch(q.value.shape, k.value.shape)});
  }
  tape.record(
      "attention", o.value, q.grad,
      [=, read = in.read] {
        kernels.attention(q.value, queries.seen(k.value), queries.seen(v.value),
                          queries.attend(blocks), o.value, lse, keys, read);
      },
      [=] {
        kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, blocks, q.grad,
                                   k.grad, v.grad, dbias, scratch);
      },
      {k.grad, v.grad, dbias});
}

}  // namespace entrain
