#include <algorithm>

#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

void head_loss(Tape& tape, Var x, Var w, Tensor targets, double scale, Tensor loss,
               Tensor predicted) {
  const int64_t T = x.value[0], V = w.value[0];
  // 4 MB of logits stay in the CPU's caches; the GPU's products want more rows at once.
  const int64_t elements = tape.device() == Device::cuda ? 1 << 27 : 1 << 20;
  const int64_t strip = std::min(T, std::max<int64_t>(64, elements / V));
  const Tensor logits = tape.scratch({strip, V});
  tape.record("head_loss", loss, x.grad,
              [=](auto k) {
                k.head_loss(x.value, w.value, targets, scale, loss, predicted, x.grad, w.grad,
                            logits);
              },
              nullptr, {w.grad});
}

}  // namespace entrain::ops
