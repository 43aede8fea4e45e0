#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

Var rmsnorm(Tape& tape, Var x, Var w, double eps) {
  const Var y = tape.var(x.value.shape);
  const Tensor rstd = tape.keep({x.value[0]}, tape.sum_dtype());
  tape.record(
      "rmsnorm", y.value, x.grad, [=](auto k) { k.rmsnorm(x.value, w.value, eps, y.value, rstd); },
      [=](auto k) { k.rmsnorm_backward(y.grad, x.value, w.value, rstd, x.grad, w.grad); },
      {w.grad});
  return y;
}

}  // namespace entrain::ops
