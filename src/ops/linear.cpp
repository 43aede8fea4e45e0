#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var linear(Tape& tape, Var x, Var w) {
  const Var y = tape.var({x.value[0], w.value[0]});
  const Kernels<Device::cpu> k;
  tape.record(
      "linear", y.value, x.grad, [=] { k.linear(x.value, w.value, y.value); },
      [=] { k.linear_backward(y.grad, x.value, w.value, x.grad, w.grad); }, {w.grad});
  return y;
}

}  // namespace entrain::ops
