#include "kernels/cpu/entmax.h"

#include <vector>

#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::entmax(Tensor z, Tensor length, double alpha, Tensor p) const {
  const int64_t R = z[0], n = z[1];
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < R; ++row) {
    const int64_t valid = length.ptr<int32_t>()[row];
    float* out = p.ptr<float>() + row * n;
    std::fill_n(out, n, 0.0f);
    if (valid == 0) continue;
    const float* in = z.ptr<float>() + row * n;
    const std::vector<double> score(in, in + valid);
    const double tau = entmax_threshold(score.data(), valid, alpha);
    for (int64_t c = 0; c < valid; ++c) {
      out[c] = static_cast<float>(entmax_probability(score[static_cast<size_t>(c)], tau, alpha));
    }
  }
}

template <>
void Kernels<Device::cpu>::entmax_backward(Tensor p, Tensor dp, double alpha, Tensor dz) const {
  const int64_t R = p[0], n = p[1];
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < R; ++row) {
    const std::vector<double> prob(p.ptr<float>() + row * n, p.ptr<float>() + (row + 1) * n);
    const std::vector<double> dprob(dp.ptr<float>() + row * n, dp.ptr<float>() + (row + 1) * n);
    std::vector<double> dscore(prob.size());
    entmax_row_backward(prob.data(), dprob.data(), n, alpha, dscore.data());
    std::copy(dscore.begin(), dscore.end(), dz.ptr<float>() + row * n);
  }
}

}  // namespace entrain
