#include <algorithm>

#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

void head_loss(Tape& tape, Var x, Var w, Tensor targets, double scale, Tensor loss,
               Tensor predicted) {
  const int64_t T = x.value[0], V = w.value[0];
  const int64_t strip = std::min(T, std::max<int64_t>(64, (1 << 20) / V));  // 4 MB of logits
  const Tensor logits = tape.scratch({strip, V});
  const Kernels<Device::cpu> k;
  tape.record("head_loss", loss, x.grad,
              [=] {
                k.head_loss(x.value, w.value, targets, scale, loss, predicted, x.grad, w.grad,
                            logits);
              },
              {}, {w.grad});
}

}  // namespace entrain::ops
