#include <algorithm>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/views.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::copy_rows(Tensor from, Tensor to) const {
  by_type(to, [&]<class T>(T) {
    const HeadView<T> in(from), out(to);
    for (int64_t b = 0; b < to[0]; ++b) {
      for (int64_t h = 0; h < to[1]; ++h) {
        for (int64_t i = 0; i < to[2]; ++i) std::copy_n(in.at(b, h, i), to[3], out.at(b, h, i));
      }
    }
  });
}

template <>
void Kernels<Device::cpu>::add(Tensor a, Tensor b, Tensor y) const {
  by_type(y, [&]<class T>(T) {
    const T* pa = a.ptr<T>();
    const T* pb = b.ptr<T>();
    T* py = y.ptr<T>();
    const int64_t n = y.numel();
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; ++i) py[i] = pa[i] + pb[i];
  });
}

}  // namespace entrain
