#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var swiglu(Tape& tape, Var gate_up) {
  const Var y = tape.var({gate_up.value[0], gate_up.value[1] / 2});
  tape.record(
      "swiglu", y.value, gate_up.grad, [=](auto k) { k.swiglu(gate_up.value, y.value); },
      [=](auto k) { k.swiglu_backward(y.grad, gate_up.value, gate_up.grad); });
  return y;
}

}  // namespace entrain::ops
