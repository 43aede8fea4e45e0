#include <algorithm>

#include "kernels/cpu/by_type.h"
#include "kernels/kernels.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::embedding(Tensor tokens, Tensor w, Tensor y) const {
  by_type(w, [&]<class T>(T) {
    const int64_t count = tokens.numel(), d = w[1];
    const int32_t* ids = tokens.ptr<int32_t>();
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < count; ++t) std::copy_n(w.ptr<T>() + ids[t] * d, d, y.ptr<T>() + t * d);
  });
}

// Threads share out the columns, not the tokens: a row that occurs twice is summed in order.
template <>
void Kernels<Device::cpu>::embedding_backward(Tensor tokens, Tensor dy, Tensor dw_sum) const {
  by_type(dy, [&]<class T>(T) {
    constexpr int64_t strip = 64;
    const int64_t count = tokens.numel(), d = dw_sum[1];
    const int32_t* ids = tokens.ptr<int32_t>();
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < d; begin += strip) {
      const int64_t end = std::min(begin + strip, d);
      for (int64_t t = 0; t < count; ++t) {
        const T* from = dy.ptr<T>() + t * d;
        T* to = dw_sum.ptr<T>() + ids[t] * d;
        for (int64_t j = begin; j < end; ++j) to[j] += from[j];
      }
    }
  });
}

}  // namespace entrain
