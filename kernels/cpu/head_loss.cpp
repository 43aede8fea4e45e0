// Output head and cross-entropy in one: logits exist for a strip of tokens at a time and turn into their
// own gradient in place, (softmax - onehot) * scale, while they are in the cache.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/math.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::head_loss(Tensor x, Tensor w, Tensor targets, double scale, Tensor loss,
                                     Tensor dx, Tensor dw_sum, Tensor logits) const {
  const int64_t T = x[0], d = x[1], V = w[0], strip = logits[0];
  float* z = logits.ptr<float>();
  for (int64_t begin = 0; begin < T; begin += strip) {
    const int64_t rows = std::min(strip, T - begin);
    const float* xs = x.ptr<float>() + begin * d;
    sgemm(false, true, rows, V, d, xs, d, w.ptr<float>(), d, 0, z, V);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; ++t) {
      float* row = z + t * V;
      const int32_t target = targets.ptr<int32_t>()[begin + t];
      float top = row[0];
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < V; ++j) top = std::max(top, row[j]);
      const float at_target = row[target] - top;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < V; ++j) {
        row[j] = fast_exp(row[j] - top);
        sum += row[j];
      }
      loss.ptr<float>()[begin + t] = std::log(sum) - at_target;
      if (!dx) continue;
      const float factor = static_cast<float>(scale) / sum;
      for (int64_t j = 0; j < V; ++j) row[j] *= factor;
      row[target] -= static_cast<float>(scale);
    }
    if (!dx) continue;
    sgemm(true, false, V, d, rows, z, V, xs, d, 1, dw_sum.ptr<float>(), d);
    sgemm(false, false, rows, d, V, z, V, w.ptr<float>(), d, 0, dx.ptr<float>() + begin * d, d);
  }
}

}  // namespace entrain
