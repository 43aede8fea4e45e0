#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
double Kernels<Device::cpu>::sum_of_squares(Tensor x) const {
  constexpr int64_t strip = 1 << 14;
  const int64_t n = x.numel(), strips = (n + strip - 1) / strip;
  thread_local std::vector<double> memory;
  std::vector<double>& sums = memory;  // the threads below must see this thread's
  sums.resize(static_cast<size_t>(strips));
  by_type(x, [&]<class T>(T) {
    const T* p = x.ptr<T>();
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < strips; ++s) {
      double sum = 0;
      const int64_t end = std::min(n, (s + 1) * strip);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = s * strip; i < end; ++i) sum += static_cast<double>(p[i]) * p[i];
      sums[static_cast<size_t>(s)] = sum;
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <>
void Kernels<Device::cpu>::adamw(Tensor w, Tensor g, Tensor m, Tensor v, Tensor decays,
                                 double g_scale, double lr, double beta1, double beta2, double c1,
                                 double c2, double eps, double decay) const {
  by_type(w, [&]<class T>(T) {
    const int64_t n = w.numel();
    T* pw = w.ptr<T>();
    T* pg = g.ptr<T>();
    T* pm = m.ptr<T>();
    T* pv = v.ptr<T>();
    const auto b1 = static_cast<T>(beta1), b2 = static_cast<T>(beta2);
    const auto step = static_cast<T>(lr / c1), inverse_c2 = static_cast<T>(1 / c2);
    const auto rate = static_cast<T>(lr * decay), scale = static_cast<T>(g_scale);
    const uint8_t* decayed = decays.ptr<uint8_t>();
    const auto small = static_cast<T>(eps);
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const T grad = pg[i] * scale;
      pm[i] = b1 * pm[i] + (1 - b1) * grad;
      pv[i] = b2 * pv[i] + (1 - b2) * grad * grad;
      const T keep = decayed[i] ? 1 - rate : T{1};
      pw[i] = keep * pw[i] - step * pm[i] / (std::sqrt(pv[i] * inverse_c2) + small);
      pg[i] = 0;
    }
  });
}

}  // namespace entrain
