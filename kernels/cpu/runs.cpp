// Runs of tokens: their means, their rows side by side, and the way back. Runs may overlap, and
// tokens may belong to none.
#include <algorithm>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/views.h"

namespace entrain {
namespace {

/// Calls f(b, h, m, row) for every run of every head, in parallel; row counts them all.
template <class F>
void for_each_run(const Tensor& x, Runs runs, F f) {
  const int64_t B = x[0], H = x[1], W = runs.within(x[2]);
#pragma omp parallel for collapse(3) schedule(static)
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t m = 0; m < W; ++m) f(b, h, m, (b * H + h) * W + m);
    }
  }
}

template <class T, class P>
void pool(Tensor x, Runs runs, Tensor pooled) {
  const HeadView<T> view(x);
  const HeadView<P> means(pooled);
  const int64_t D = x[3];
  const P scale = 1 / static_cast<P>(runs.length);
  for_each_run(x, runs, [&](int64_t b, int64_t h, int64_t m, int64_t) {
    P* mean = means.at(b, h, m);
    const T* token = view.at(b, h, m * runs.stride);
    std::fill_n(mean, D, P{0});
    for (int64_t t = 0; t < runs.length; ++t, token += view.token_step) {
      for (int64_t d = 0; d < D; ++d) mean[d] += token[d];
    }
    for (int64_t d = 0; d < D; ++d) mean[d] *= scale;
  });
}

}  // namespace

template <>
void Kernels<Device::cpu>::pool_runs(Tensor x, Runs runs, Tensor pooled) const {
  by_type(x,
          [&]<class T>(T) { by_type(pooled, [&]<class P>(P) { pool<T, P>(x, runs, pooled); }); });
}

template <>
void Kernels<Device::cpu>::unfold_runs(Tensor x, Runs runs, Tensor offset, Tensor rows) const {
  by_type(x, [&]<class T>(T) {
    const HeadView<T> view(x);
    const int64_t D = x[3], width = runs.length * D;
    const T* plus = offset ? offset.ptr<T>() : nullptr;
    for_each_run(x, runs, [&](int64_t b, int64_t h, int64_t m, int64_t row) {
      T* out = rows.ptr<T>() + row * width;
      const T* token = view.at(b, h, m * runs.stride);
      for (int64_t t = 0; t < runs.length; ++t, token += view.token_step) {
        std::copy_n(token, D, out + t * D);
      }
      for (int64_t j = 0; plus && j < width; ++j) out[j] += plus[j];
    });
  });
}

template <>
void Kernels<Device::cpu>::fold_runs(Tensor drows, Tensor dpooled, Runs runs, Tensor dx) const {
  by_type(dx, [&]<class T>(T) {
    const HeadView<T> view(dx);
    const int64_t B = dx[0], H = dx[1], N = dx[2], D = dx[3], W = runs.within(N);
    const T scale = T{1} / static_cast<T>(runs.length);
#pragma omp parallel for collapse(3) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t i = 0; i < N; ++i) {
          T* out = view.at(b, h, i);
          std::fill_n(out, D, T{0});
          // Runs that hold token i: those begun by it that did not end before it.
          const int64_t end = std::min(W, i / runs.stride + 1);
          for (int64_t m = runs.within(i); m < end; ++m) {
            const int64_t row = (b * H + h) * W + m;
            const T* mean = dpooled.ptr<T>() + row * D;
            for (int64_t d = 0; d < D; ++d) out[d] += scale * mean[d];
            if (!drows) continue;
            const T* own = drows.ptr<T>() + (row * runs.length + i - m * runs.stride) * D;
            for (int64_t d = 0; d < D; ++d) out[d] += own[d];
          }
        }
      }
    }
  });
}

template <>
void Kernels<Device::cpu>::add_rows(Tensor x, Tensor sum) const {
  by_type(x, [&]<class T>(T) {
    constexpr int64_t strip = 64;  // columns of a task, which sums them in order
    const int64_t rows = x[0], n = x[1];
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += strip) {
      const int64_t end = std::min(n, begin + strip);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = begin; j < end; ++j) sum.ptr<T>()[j] += x.ptr<T>()[row * n + j];
      }
    }
  });
}

}  // namespace entrain
