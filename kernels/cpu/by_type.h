#pragma once
#include "core/error.h"
#include "core/tensor.h"

namespace entrain {

/// Calls f with a value of t's element type: training runs float, the definition double.
template <class F>
void by_type(const Tensor& t, F f) {
  if (t.dtype == DType::f64) {
    f(double{});
  } else {
    require(t.dtype == DType::f32, "the CPU computes in f32 or f64, not {}", name_of(t.dtype));
    f(float{});
  }
}

}  // namespace entrain
