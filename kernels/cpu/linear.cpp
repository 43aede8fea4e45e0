#include <cstring>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::linear(Tensor x, Tensor w, Tensor y, Tensor base) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], in = w[1], out = w[0];
    const T beta = base ? 1 : 0;
    if (base) std::memcpy(y.data, base.data, y.bytes());
    if (count == 1) {  // decoding: gemm would first copy the whole matrix into its own order
      return gemv(out, in, w.ptr<T>(), x.ptr<T>(), beta, y.ptr<T>());
    }
    gemm(false, true, count, out, in, x.ptr<T>(), in, w.ptr<T>(), in, beta, y.ptr<T>(), out);
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
