#include "kernels/cpu/blas.h"
#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::linear(Tensor x, Tensor w, Tensor y) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], in = w[1], out = w[0];
    gemm(false, true, count, out, in, x.ptr<T>(), in, w.ptr<T>(), in, T{0}, y.ptr<T>(), out);
  });
}

template <>
void Kernels<Device::cpu>::linear_backward(Tensor dy, Tensor x, Tensor w, Tensor dx,
                                           Tensor dw_sum) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], in = w[1], out = w[0];
    gemm(true, false, out, in, count, dy.ptr<T>(), out, x.ptr<T>(), in, T{1}, dw_sum.ptr<T>(), in);
    gemm(false, false, count, in, out, dy.ptr<T>(), out, w.ptr<T>(), in, T{0}, dx.ptr<T>(), in);
  });
}

}  // namespace entrain
