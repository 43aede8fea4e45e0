// y = silu(gate) up (Shazeer 2020), silu(a) = a / (1 + e^-a).
#include "kernels/cpu/by_type.h"
#include "kernels/cpu/math.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::swiglu(Tensor gate_up, Tensor y) const {
  by_type(y, [&]<class T>(T) {
    const int64_t count = y[0], f = y[1];
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const T* gate = gate_up.ptr<T>() + t * 2 * f;
      const T* up = gate + f;
      T* out = y.ptr<T>() + t * f;
#pragma omp simd
      for (int64_t j = 0; j < f; ++j) out[j] = gate[j] / (1 + fast_exp(-gate[j])) * up[j];
    }
  });
}

template <>
void Kernels<Device::cpu>::swiglu_backward(Tensor dy, Tensor gate_up, Tensor dgate_up) const {
  by_type(dy, [&]<class T>(T) {
    const int64_t count = dy[0], f = dy[1];
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const T* gate = gate_up.ptr<T>() + t * 2 * f;
      const T* up = gate + f;
      const T* d = dy.ptr<T>() + t * f;
      T* dgate = dgate_up.ptr<T>() + t * 2 * f;
      T* dup = dgate + f;
#pragma omp simd
      for (int64_t j = 0; j < f; ++j) {
        const T sigmoid = 1 / (1 + fast_exp(-gate[j]));
        const T silu = gate[j] * sigmoid;
        dup[j] = d[j] * silu;
        dgate[j] = d[j] * up[j] * (sigmoid + silu * (1 - sigmoid));
      }
    }
  });
}

}  // namespace entrain
