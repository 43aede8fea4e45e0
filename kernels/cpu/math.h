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

/// e^x within 2 ulp for x <= 709; 0 below -708 (minus infinity included). NaN stays NaN. As above,
/// with a polynomial of degree 13.
inline double fast_exp(double x) {
  const double t = x * 1.4426950408889634 + 0x1.8p52;
  const double n = t - 0x1.8p52;
  const double r = (x - n * 0x1.62e42fefp-1) + n * -0x1.473de6af278edp-34;  // ln 2 in two parts
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const uint64_t exponent = std::bit_cast<uint64_t>(t) << 52;
  const double y = std::bit_cast<double>(std::bit_cast<uint64_t>(p) + exponent);
  return x < -708.0 ? 0.0 : (x > 709.0 ? x * 1.7e308 : (x == x ? y : x));
}

}  // namespace entrain
