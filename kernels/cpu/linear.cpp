#include "kernels/cpu/blas.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::linear(Tensor x, Tensor w, Tensor y) const {
  const int64_t T = x[0], in = w[1], out = w[0];
  sgemm(false, true, T, out, in, x.ptr<float>(), in, w.ptr<float>(), in, 0, y.ptr<float>(), out);
}

template <>
void Kernels<Device::cpu>::linear_backward(Tensor dy, Tensor x, Tensor w, Tensor dx,
                                           Tensor dw_sum) const {
  const int64_t T = x[0], in = w[1], out = w[0];
  sgemm(true, false, out, in, T, dy.ptr<float>(), out, x.ptr<float>(), in, 1, dw_sum.ptr<float>(), in);
  sgemm(false, false, T, in, out, dy.ptr<float>(), out, w.ptr<float>(), in, 0, dx.ptr<float>(), in);
}

}  // namespace entrain
