#pragma once
// Scalar functions that the compiler turns into vector code inside `omp simd` loops.
#include <bit>
#include <cmath>
#include <cstdint>

namespace entrain {

/// e^x within 2 ulp for x <= 88; 0 below -87.3 (minus infinity included). NaN stays NaN.
/// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7.
inline float fast_exp(float x) {
  const float t =
      x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const float n = t - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(t) << 23;
  const float y = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + exponent);
  return x < -87.3f ? 0.0f : (x > 88.0f ? x * 3.4e38f : (x == x ? y : x));
}

inline double fast_exp(double x) {
  return std::exp(x);
}

}  // namespace entrain
