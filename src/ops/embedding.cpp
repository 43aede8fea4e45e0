#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var embedding(Tape& tape, Tensor tokens, Var w) {
  const Var y = tape.shared_var({tokens.numel(), w.value[1]});
  const Kernels<Device::cpu> k;
  tape.record(
      "embedding", y.value, w.grad, [=] { k.embedding(tokens, w.value, y.value); },
      [=] { k.embedding_backward(tokens, y.grad, w.grad); });
  return y;
}

}  // namespace entrain::ops
