#include "attention/record_attention.h"

namespace entrain {

AttentionScratch attention_scratch(Tape& tape, Tensor q, Tensor k, Queries queries) {
  return with_kernels(tape.device(), [&](auto kernels) {
    AttentionScratch scratch;
    if (!queries.decoding()) {
      scratch.forward = tape.scratch({kernels.attention_scratch(q, k)}, DType::u8);
    }
    if (tape.training()) {
      scratch.backward = tape.scratch({kernels.attention_backward_scratch(q, k)}, DType::u8);
    }
    return scratch;
  });
}

void record_attention(Tape& tape, const AttentionInput& in, const BlockSet& blocks, Tensor dbias,
                      Var o) {
  const Var q = in.q, k = in.k, v = in.v;
  const Queries queries = in.queries();
  const Tensor lse = tape.keep({q.value[0], q.value[1], q.value[2]}, tape.sum_dtype());
  const AttentionScratch scratch = attention_scratch(tape, q.value, k.value, queries);
  tape.record(
      "attention", o.value, q.grad,
      [=, read = in.read](auto kernels) {
        kernels.attention(q.value, queries.seen(k.value), queries.seen(v.value),
                          queries.attend(blocks), o.value, lse, scratch.forward, read);
      },
      [=](auto kernels) {
        kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, blocks, q.grad,
                                   k.grad, v.grad, dbias, scratch.backward);
      },
      {k.grad, v.grad, dbias});
}

}  // namespace entrain
