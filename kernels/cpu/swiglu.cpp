// y = silu(gate) up (Shazeer 2020), silu(a) = a / (1 + e^-a).
#include "kernels/cpu/math.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::swiglu(Tensor gate_up, Tensor y) const {
  const int64_t T = y[0], f = y[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* gate = gate_up.ptr<float>() + t * 2 * f;
    const float* up = gate + f;
    float* out = y.ptr<float>() + t * f;
#pragma omp simd
    for (int64_t j = 0; j < f; ++j) out[j] = gate[j] / (1 + fast_exp(-gate[j])) * up[j];
  }
}

template <>
void Kernels<Device::cpu>::swiglu_backward(Tensor dy, Tensor gate_up, Tensor dgate_up) const {
  const int64_t T = dy[0], f = dy[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* gate = gate_up.ptr<float>() + t * 2 * f;
    const float* up = gate + f;
    const float* d = dy.ptr<float>() + t * f;
    float* dgate = dgate_up.ptr<float>() + t * 2 * f;
    float* dup = dgate + f;
#pragma omp simd
    for (int64_t j = 0; j < f; ++j) {
      const float sigmoid = 1 / (1 + fast_exp(-gate[j]));
      const float silu = gate[j] * sigmoid;
      dup[j] = d[j] * silu;
      dgate[j] = d[j] * up[j] * (sigmoid + silu * (1 - sigmoid));
    }
  }
}

}  // namespace entrain
