// Output head and cross-entropy in one: logits exist for a strip of tokens at a time and turn into
// their own gradient in place, (softmax - onehot) * scale, while they are in the cache.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/by_type.h"
#include "kernels/cpu/math.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::head_loss(Tensor x, Tensor w, Tensor targets, double scale, Tensor loss,
                                     Tensor predicted, Tensor dx, Tensor dw_sum,
                                     Tensor logits) const {
  by_type(x, [&]<class T>(T) {
    const int64_t count = x[0], d = x[1], V = w[0], strip = logits[0];
    T* z = logits.ptr<T>();
    for (int64_t begin = 0; begin < count; begin += strip) {
      const int64_t rows = std::min(strip, count - begin);
      const T* xs = x.ptr<T>() + begin * d;
      gemm(false, true, rows, V, d, xs, d, w.ptr<T>(), d, T{0}, z, V);
#pragma omp parallel for schedule(static)
      for (int64_t t = 0; t < rows; ++t) {
        T* row = z + t * V;
        const int32_t target = targets.ptr<int32_t>()[begin + t];
        T top = row[0];
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < V; ++j) top = std::max(top, row[j]);
        if (predicted) {
          predicted.ptr<int32_t>()[begin + t] =
              static_cast<int32_t>(std::find(row, row + V, top) - row);
        }
        const T at_target = row[target] - top;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; ++j) {
          row[j] = fast_exp(row[j] - top);
          sum += row[j];
        }
        loss.ptr<T>()[begin + t] = std::log(sum) - at_target;
        if (!dx) continue;
        const T factor = static_cast<T>(scale) / sum;
        for (int64_t j = 0; j < V; ++j) row[j] *= factor;
        row[target] -= static_cast<T>(scale);
      }
      if (!dx) continue;
      gemm(true, false, V, d, rows, z, V, xs, d, T{1}, dw_sum.ptr<T>(), d);
      gemm(false, false, rows, d, V, z, V, w.ptr<T>(), d, T{0}, dx.ptr<T>() + begin * d, d);
    }
  });
}

}  // namespace entrain
