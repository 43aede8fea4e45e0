// Rotary positions (Su et al. 2021) in Hugging Face's half-split convention: elements j and j + D/2
// of a head turn by position * theta^(-2j/D).
#include "kernels/cpu/by_type.h"
#include "kernels/cpu/views.h"

namespace entrain {

template <>
void Kernels<Device::cpu>::rope(Tensor x, Tensor cos_sin, bool inverse) const {
  by_type(x, [&]<class T>(T) {
    const HeadView<T> view(x);
    const int64_t B = x[0], H = x[1], N = x[2], half = x[3] / 2;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < N; ++i) {
        const T* cosine = cos_sin.ptr<T>() + i * 2 * half;
        const T* sine = cosine + half;
        for (int64_t h = 0; h < H; ++h) {
          T* low = view.at(b, h, i);
          T* high = low + half;
          for (int64_t j = 0; j < half; ++j) {
            const T s = inverse ? -sine[j] : sine[j], a = low[j], c = high[j];
            low[j] = a * cosine[j] - c * s;
            high[j] = c * cosine[j] + a * s;
          }
        }
      }
    }
  });
}

}  // namespace entrain
