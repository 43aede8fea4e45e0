// Gates: one number in (0, 1) a query and head, which scales what a branch hands it.
#include <cmath>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/views.h"

namespace entrain {
namespace {

/// Calls f(b, h, i) for every row of x [B, H, N, D], in parallel.
template <class F>
void for_each_row(const Tensor& x, F f) {
#pragma omp parallel for collapse(3) schedule(static)
  for (int64_t b = 0; b < x[0]; ++b) {
    for (int64_t h = 0; h < x[1]; ++h) {
      for (int64_t i = 0; i < x[2]; ++i) f(b, h, i);
    }
  }
}

}  // namespace

template <>
void Kernels<Device::cpu>::gate(Tensor x, Tensor bias, Tensor gate) const {
  by_type(x, [&]<class T>(T) {
    const HeadView<T> xv(x), gv(gate);
    for_each_row(x, [&](int64_t b, int64_t h, int64_t i) {
      *gv.at(b, h, i) = 1 / (1 + std::exp(-(*xv.at(b, h, i) + bias.ptr<T>()[h])));
    });
  });
}

template <>
void Kernels<Device::cpu>::gate_backward(Tensor dgate, Tensor gate, Tensor dx,
                                         Tensor dbias_sum) const {
  by_type(gate, [&]<class T>(T) {
    const HeadView<T> dgv(dgate), gv(gate), dxv(dx);
#pragma omp parallel for schedule(static)
    for (int64_t h = 0; h < gate[1]; ++h) {  // one thread a head: dbias is summed in order
      T sum = 0;
      for (int64_t b = 0; b < gate[0]; ++b) {
        for (int64_t i = 0; i < gate[2]; ++i) {
          const T g = *gv.at(b, h, i);
          sum += *dxv.at(b, h, i) = *dgv.at(b, h, i) * g * (1 - g);
        }
      }
      dbias_sum.ptr<T>()[h] += sum;
    }
  });
}

template <>
void Kernels<Device::cpu>::scale_rows(Tensor x, Tensor gate, bool add, Tensor y) const {
  by_type(x, [&]<class T>(T) {
    const HeadView<T> xv(x), gv(gate), yv(y);
    for_each_row(x, [&](int64_t b, int64_t h, int64_t i) {
      const T* from = xv.at(b, h, i);
      T* to = yv.at(b, h, i);
      const T g = *gv.at(b, h, i);
      for (int64_t d = 0; d < x[3]; ++d) to[d] = (add ? to[d] : T{0}) + g * from[d];
    });
  });
}

template <>
void Kernels<Device::cpu>::scale_rows_backward(Tensor dy, Tensor x, Tensor gate, Tensor dx,
                                               Tensor dgate) const {
  by_type(x, [&]<class T>(T) {
    const HeadView<T> dyv(dy), xv(x), gv(gate), dxv(dx), dgv(dgate);
    for_each_row(x, [&](int64_t b, int64_t h, int64_t i) {
      const T* d_out = dyv.at(b, h, i);
      const T* from = xv.at(b, h, i);
      T* to = dxv.at(b, h, i);
      const T g = *gv.at(b, h, i);
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < x[3]; ++d) dot += d_out[d] * from[d];
      for (int64_t d = 0; d < x[3]; ++d) to[d] = g * d_out[d];
      *dgv.at(b, h, i) = dot;
    });
  });
}

}  // namespace entrain
