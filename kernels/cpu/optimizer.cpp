#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::add_sum(Tensor x, Tensor sum) const {
  by_type(x, [&]<class T>(T) {
    double total = 0;
    for (int64_t i = 0; i < x.numel(); ++i) total += static_cast<double>(x.ptr<T>()[i]);
    *sum.ptr<double>() += total;
  });
}

template <>
void Kernels<Device::cpu>::sum_of_squares(Tensor x, Tensor sum) const {
  constexpr int64_t strip = 1 << 14;
  const int64_t n = x.numel(), strips = (n + strip - 1) / strip;
  thread_local std::vector<double> memory;
  std::vector<double>& sums = memory;  // the threads below must see this thread's
  sums.resize(static_cast<size_t>(strips));
  by_type(x, [&]<class T>(T) {
    const T* p = x.ptr<T>();
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < strips; ++s) {
      double strip_sum = 0;
      const int64_t end = std::min(n, (s + 1) * strip);
#pragma omp simd reduction(+ : strip_sum)
      for (int64_t i = s * strip; i < end; ++i) strip_sum += static_cast<double>(p[i]) * p[i];
      sums[static_cast<size_t>(s)] = strip_sum;
    }
  });
  double& total = *sum.ptr<double>();
  total = 0;
  for (const double strip_sum : sums) total += strip_sum;
}

template <>
void Kernels<Device::cpu>::adamw(Tensor w, Tensor g, Tensor m, Tensor v, Tensor decays,
                                 Tensor squares, const AdamW& a, Tensor) const {
  const double norm = std::sqrt(*squares.ptr<double>());
  if (!std::isfinite(norm)) return;
  const double g_scale = a.clip > 0 && norm > a.clip ? a.clip / norm : 1;
  const double lr = a.lr_c1_c2[0], c1 = a.lr_c1_c2[1], c2 = a.lr_c1_c2[2];
  by_type(w, [&]<class T>(T) {
    const int64_t n = w.numel();
    T* pw = w.ptr<T>();
    T* pg = g.ptr<T>();
    T* pm = m.ptr<T>();
    T* pv = v.ptr<T>();
    const auto b1 = static_cast<T>(a.beta1), b2 = static_cast<T>(a.beta2);
    const auto step = static_cast<T>(lr / c1), inverse_c2 = static_cast<T>(1 / c2);
    const auto rate = static_cast<T>(lr * a.decay), scale = static_cast<T>(g_scale);
    const uint8_t* decayed = decays.ptr<uint8_t>();
    const auto small = static_cast<T>(a.eps);
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
