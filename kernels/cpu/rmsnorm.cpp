// y = x rstd w with rstd = rsqrt(mean(x^2) + eps), a row a token (Zhang and Sennrich 2019).
#include <algorithm>
#include <cmath>

#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::rmsnorm(Tensor x, Tensor w, double eps, Tensor y, Tensor rstd) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], d = x[1];
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const T* xt = x.ptr<T>() + t * d;
      T* yt = y.ptr<T>() + t * d;
      T squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < d; ++j) squares += xt[j] * xt[j];
      const T r = 1 / std::sqrt(squares / static_cast<T>(d) + static_cast<T>(eps));
      for (int64_t j = 0; j < d; ++j) yt[j] = xt[j] * r * w.ptr<T>()[j];
      rstd.ptr<T>()[t] = r;
    }
  });
}

// With n = x rstd: dx = rstd (w dy - n mean(w dy n)), dw = sum_t dy n. dw goes through one partial
// sum a strip of columns, each summed over tokens in order.
template <>
void Kernels<Device::cpu>::rmsnorm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd,
                                            Tensor dx_sum, Tensor dw_sum) const {
  by_type(x, [&]<class T>(T) {
    constexpr int64_t strip = 64;
    const int64_t count = x[0], d = x[1];
    const T* r = rstd.ptr<T>();
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < d; begin += strip) {
        const int64_t width = std::min(strip, d - begin);
        T sum[strip] = {};
        for (int64_t t = 0; t < count; ++t) {
          const T* xt = x.ptr<T>() + t * d + begin;
          const T* dyt = dy.ptr<T>() + t * d + begin;
          for (int64_t j = 0; j < width; ++j) sum[j] += dyt[j] * (xt[j] * r[t]);
        }
        for (int64_t j = 0; j < width; ++j) dw_sum.ptr<T>()[begin + j] += sum[j];
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) {
        const T* xt = x.ptr<T>() + t * d;
        const T* dyt = dy.ptr<T>() + t * d;
        const T* pw = w.ptr<T>();
        T* dxt = dx_sum.ptr<T>() + t * d;
        T dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < d; ++j) dot += pw[j] * dyt[j] * xt[j];
        const T c = dot * r[t] * r[t] / static_cast<T>(d);
        for (int64_t j = 0; j < d; ++j) dxt[j] += r[t] * (pw[j] * dyt[j] - xt[j] * c);
      }
    }
  });
}

}  // namespace entrain
