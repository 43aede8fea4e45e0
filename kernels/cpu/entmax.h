#pragma once
// alpha-entmax of one row (Peters, Niculae, Martins 2019, arXiv 1905.05702), in double: routing
// divides by its results, so float's rounding near the threshold would show in the gradients.
//
// With a = (alpha - 1) z and r = 1 / (alpha - 1): p_c = max(0, a_c - tau)^r, sum p = 1. The
// threshold is the root of h(tau) = ||(a - tau)+||_r - 1, which is convex and decreasing for r >=
// 1, so Newton's steps from the left never overshoot: 4 to 8 of them for alpha = 1.5, a finite
// number for 2.
//
// Loops are written once per exponent (r = 2, r = 1, any) so that the compiler turns the common
// ones into vector code.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace entrain {

/// The largest of n >= 1 scores.
inline double entmax_top(const double* z, int64_t n) {
  double top = z[0];
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) top = std::max(top, z[c]);
  return top;
}

/// The threshold tau of a row of n >= 1 scores; for alpha = 1, the log of the softmax's sum. kept:
/// scratch of n.
inline double entmax_threshold(const double* z, int64_t n, double alpha, double* kept) {
  const double top = entmax_top(z, n);
  if (alpha == 1) {
    double sum = 0;
    for (int64_t c = 0; c < n; ++c) sum += std::exp(z[c] - top);
    return top + std::log(sum);
  }
  // Entries 1 below the top are off the support; few are left where routing is sparse.
  const double scale = alpha - 1, r = 1 / scale, bound = scale * top - 1;
  int64_t m = 0;
  for (int64_t c = 0; c < n; ++c) {
    kept[m] = scale * z[c];
    m += kept[m] > bound ? 1 : 0;
  }
  double t = bound;  // the largest entry alone gives h >= 0 here
  for (int step = 0; step < 100; ++step) {
    double f = 0, df = 0;  // sum of d^r and of d^(r-1)
    if (r == 2) {
#pragma omp simd reduction(+ : f, df)
      for (int64_t c = 0; c < m; ++c) {
        const double d = std::max(0.0, kept[c] - t);
        f += d * d;
        df += d;
      }
    } else if (r == 1) {
#pragma omp simd reduction(+ : f, df)
      for (int64_t c = 0; c < m; ++c) {
        const double d = kept[c] - t;
        f += d > 0 ? d : 0.0;
        df += d > 0 ? 1.0 : 0.0;
      }
    } else {
      for (int64_t c = 0; c < m; ++c) {
        const double d = kept[c] - t;
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
  return t;
}

/// p of a row given its threshold: exact zeros off the support.
inline void entmax_probabilities(const double* z, int64_t n, double tau, double alpha, double* p) {
  const double scale = alpha - 1;
  if (alpha == 1.5) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const double d = scale * z[c] - tau;
      p[c] = d <= 0 ? 0.0 : d * d;  // NaN stays NaN
    }
  } else if (alpha == 2) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const double d = z[c] - tau;
      p[c] = d <= 0 ? 0.0 : d;
    }
  } else {
    for (int64_t c = 0; c < n; ++c) {
      const double d = scale * z[c] - tau;
      p[c] = alpha == 1 ? std::exp(z[c] - tau) : (d <= 0 ? 0.0 : std::pow(d, 1 / scale));
    }
  }
}

/// dz = s (dp - sum(s dp) / sum(s)), s = p^(2 - alpha) on the support.
inline void entmax_row_backward(const double* p, const double* dp, int64_t n, double alpha,
                                double* dz) {
  if (alpha == 1.5) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) dz[c] = __builtin_sqrt(p[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) dz[c] = p[c] > 0 ? std::pow(p[c], 2 - alpha) : 0;
  }
  double total = 0, weighted = 0;
#pragma omp simd reduction(+ : total, weighted)
  for (int64_t c = 0; c < n; ++c) {
    total += dz[c];
    weighted += dz[c] * dp[c];
  }
  const double mean = total > 0 ? weighted / total : 0;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) dz[c] *= dp[c] - mean;
}

}  // namespace entrain
