#include <cmath>

#include "kernels/kernels.h"
#include "ops/ops.h"

namespace entrain::ops {

void rope(Tape& tape, Var x, Tensor cos_sin, const int64_t* first) {
  tape.record(
      "rope", x.value, x.grad,
      [=](auto k) { k.rope(x.value, cos_sin.slice(0, first ? *first : 0, x.value[2]), false); },
      [=](auto k) { k.rope(x.grad, cos_sin, true); });
}

void rope_table(Tensor cos_sin, double theta) {
  const int64_t N = cos_sin[0], D = cos_sin[1];
  auto put = [&](int64_t at, double x) {
    if (cos_sin.dtype == DType::f64) {
      cos_sin.ptr<double>()[at] = x;
    } else {
      cos_sin.ptr<float>()[at] = static_cast<float>(x);
    }
  };
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t j = 0; j < D / 2; ++j) {
      const double frequency =
          std::pow(theta, -2.0 * static_cast<double>(j) / static_cast<double>(D));
      const double angle = static_cast<double>(i) * frequency;
      put(i * D + j, std::cos(angle));
      put(i * D + D / 2 + j, std::sin(angle));
    }
  }
}

}  // namespace entrain::ops
