#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var linear(Tape& tape, Var x, Var w) {
  const Var y = tape.var({x.value[0], w.value[0]});
  tape.record(
      "linear", y.value, x.grad, [=](auto k) { k.linear(x.value, w.value, y.value); },
      [=](auto k) { k.linear_backward(y.grad, x.value, w.value, x.grad, w.grad); }, {w.grad});
  return y;
}

Var add_linear(Tape& tape, Var base, Var x, Var w) {
  const Var y{tape.keep(base.value.shape), base.grad};
  tape.record(
      "add_linear", y.value, x.grad,
      [=](auto k) { k.linear(x.value, w.value, y.value, base.value); },
      [=](auto k) { k.linear_backward(y.grad, x.value, w.value, x.grad, w.grad); }, {w.grad});
  return y;
}

}  // namespace entrain::ops
