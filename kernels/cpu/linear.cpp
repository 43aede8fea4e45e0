#include "kernels/cpu/blas.h"
#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::linear(Tensor x, Tensor w, Tensor y) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], in = w[1], out = w[0];
    if (count == 1) {  // decoding: gemm would first copy the whole matrix into its own order
      return gemv(out, in, w.ptr<T>(), x.ptr<T>(), y.ptr<T>());
    }
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
