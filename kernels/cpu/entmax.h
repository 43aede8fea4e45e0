#pragma once
// alpha-entmax of one row (Peters, Niculae, Martins 2019, arXiv 1905.05702), in double: routing
// divides by its results, so float's rounding near the threshold would show in the gradients.
//
// With a = (alpha - 1) z and r = 1 / (alpha - 1): p_c = max(0, a_c - tau)^r, sum p = 1. The
// threshold is the root of h(tau) = ||(a - tau)+||_r - 1, which is convex and decreasing for r >=
// 1, so Newton's steps from the left never overshoot: 4 to 8 of them for alpha = 1.5, a finite
// number for 2.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace entrain {

/// max(0, d)^r for the exponent r = 1 / (alpha - 1).
inline double entmax_power(double d, double r) {
  if (d <= 0) return 0;
  if (r == 2) return d * d;
  if (r == 1) return d;
  return std::pow(d, r);
}

/// The threshold tau of a row of n >= 1 scores; for alpha = 1, the log of the softmax's sum.
inline double entmax_threshold(const double* z, int64_t n, double alpha) {
  double top = z[0];
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) top = std::max(top, z[c]);
  if (alpha == 1) {
    double sum = 0;
    for (int64_t c = 0; c < n; ++c) sum += std::exp(z[c] - top);
    return top + std::log(sum);
  }
  const double scale = alpha - 1, r = 1 / scale;
  // At top - 1 the largest entry alone gives h >= 0. Offsets from the top keep the digits of tau.
  double t = -1;
  for (int step = 0; step < 100; ++step) {
    double f = 0, df = 0;  // sum of d^r and of d^(r-1)
    if (r == 2) {
#pragma omp simd reduction(+ : f, df)
      for (int64_t c = 0; c < n; ++c) {
        const double d = std::max(0.0, scale * (z[c] - top) - t);
        f += d * d;
        df += d;
      }
    } else if (r == 1) {
#pragma omp simd reduction(+ : f, df)
      for (int64_t c = 0; c < n; ++c) {
        const double d = scale * (z[c] - top) - t;
        f += d > 0 ? d : 0.0;
        df += d > 0 ? 1.0 : 0.0;
      }
    } else {
      for (int64_t c = 0; c < n; ++c) {
        const double d = scale * (z[c] - top) - t;
        if (d <= 0) continue;
        const double power = std::pow(d, r - 1);
        f += power * d;
        df += power;
      }
    }
    const double norm = r == 2 ? std::sqrt(f) : (r == 1 ? f : std::pow(f, scale));
    const double next = t + (norm - 1) * f / (norm * df);
    if (!(next > t)) break;  // converged to rounding, or NaN
    t = next;
  }
  return scale * top + t;
}

/// p_c given the threshold: exact zeros off the support.
inline double entmax_probability(double z, double tau, double alpha) {
  if (alpha == 1) return std::exp(z - tau);
  const double scale = alpha - 1;
  return entmax_power(scale * z - tau, 1 / scale);
}

/// dz = s (dp - sum(s dp) / sum(s)), s = p^(2 - alpha) on the support.
inline void entmax_row_backward(const double* p, const double* dp, int64_t n, double alpha,
                                double* dz) {
  double total = 0, weighted = 0;
  for (int64_t c = 0; c < n; ++c) {
    double s = 0;
    if (p[c] > 0) s = alpha == 1.5 ? std::sqrt(p[c]) : std::pow(p[c], 2 - alpha);
    dz[c] = s;
    total += s;
    weighted += s * dp[c];
  }
  const double mean = total > 0 ? weighted / total : 0;
  for (int64_t c = 0; c < n; ++c) dz[c] *= dp[c] - mean;
}

}  // namespace entrain
