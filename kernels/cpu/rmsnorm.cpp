// y = x rstd w with rstd = rsqrt(mean(x^2) + eps), a row a token (Zhang and Sennrich 2019).
#include <algorithm>
#include <cmath>

#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::rmsnorm(Tensor x, Tensor w, double eps, Tensor y, Tensor rstd) const {
  const int64_t T = x[0], d = x[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* xt = x.ptr<float>() + t * d;
    float* yt = y.ptr<float>() + t * d;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < d; ++j) squares += xt[j] * xt[j];
    const float r = 1 / std::sqrt(squares / static_cast<float>(d) + static_cast<float>(eps));
    for (int64_t j = 0; j < d; ++j) yt[j] = xt[j] * r * w.ptr<float>()[j];
    rstd.ptr<float>()[t] = r;
  }
}

// With n = x rstd: dx = rstd (w dy - n mean(w dy n)), dw = sum_t dy n. dw goes through one partial sum a
// strip of columns, each summed over tokens in order.
template <>
void Kernels<Device::cpu>::rmsnorm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor dx_sum,
                                            Tensor dw_sum) const {
  constexpr int64_t strip = 64;
  const int64_t T = x[0], d = x[1];
  const float* r = rstd.ptr<float>();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < d; begin += strip) {
      const int64_t width = std::min(strip, d - begin);
      float sum[strip] = {};
      for (int64_t t = 0; t < T; ++t) {
        const float* xt = x.ptr<float>() + t * d + begin;
        const float* dyt = dy.ptr<float>() + t * d + begin;
        for (int64_t j = 0; j < width; ++j) sum[j] += dyt[j] * (xt[j] * r[t]);
      }
      for (int64_t j = 0; j < width; ++j) dw_sum.ptr<float>()[begin + j] += sum[j];
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      const float* xt = x.ptr<float>() + t * d;
      const float* dyt = dy.ptr<float>() + t * d;
      const float* pw = w.ptr<float>();
      float* dxt = dx_sum.ptr<float>() + t * d;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < d; ++j) dot += pw[j] * dyt[j] * xt[j];
      const float c = dot * r[t] * r[t] / static_cast<float>(d);
      for (int64_t j = 0; j < d; ++j) dxt[j] += r[t] * (pw[j] * dyt[j] - xt[j] * c);
    }
  }
}

}  // namespace entrain
