#include "kernels/cpu/entmax.h"

#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::entmax(Tensor z, Tensor length, double alpha, Tensor p) const {
  by_type(z, [&]<class T>(T) {
    const int64_t R = z[0], n = z[1];
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < R; ++row) {
      const int64_t valid = length.ptr<int32_t>()[row];
      T* out = p.ptr<T>() + row * n;
      std::fill_n(out, n, T{0});
      if (valid == 0) continue;
      const T* in = z.ptr<T>() + row * n;
      std::vector<double> score(in, in + valid);
      // Probabilities are the same, and keep their digits however large the scores are.
      const double top = entmax_top(score.data(), valid);
      for (double& x : score) x -= top;
      std::vector<double> prob(score.size());
      const double tau = entmax_threshold(score.data(), valid, alpha, prob.data());
      entmax_probabilities(score.data(), valid, tau, alpha, prob.data());
      std::copy(prob.begin(), prob.end(), out);
    }
  });
}

template <>
void Kernels<Device::cpu>::entmax_backward(Tensor p, Tensor dp, double alpha, Tensor dz) const {
  by_type(p, [&]<class T>(T) {
    const int64_t R = p[0], n = p[1];
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < R; ++row) {
      const std::vector<double> prob(p.ptr<T>() + row * n, p.ptr<T>() + (row + 1) * n);
      const std::vector<double> dprob(dp.ptr<T>() + row * n, dp.ptr<T>() + (row + 1) * n);
      std::vector<double> dscore(prob.size());
      entmax_row_backward(prob.data(), dprob.data(), n, alpha, dscore.data());
      std::copy(dscore.begin(), dscore.end(), dz.ptr<T>() + row * n);
    }
  });
}

}  // namespace entrain
