#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var embedding(Tape& tape, Tensor tokens, Var w) {
  const Var y = tape.shared_var({tokens.numel(), w.value[1]});
  tape.record(
      "embedding", y.value, w.grad, [=](auto k) { k.embedding(tokens, w.value, y.value); },
      [=](auto k) { k.embedding_backward(tokens, y.grad, w.grad); });
  return y;
}

}  // namespace entrain::ops
