#pragma once
// alpha-entmax of rows in shared memory, in double: the GPU's kernels/cpu/entmax.h, which see for
// the mathematics and for why Newton's steps from the left converge. A few lanes share a row, so
// that short rows do not leave most of a warp idle; every lane holds columns rank, rank + width...
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

/// Neighbouring lanes that share a row: `width` of them, a power of two, the same in all of a warp.
/// All lanes of a warp must call sum() and max() together.
struct Lanes {
  int width, rank;

  __device__ explicit Lanes(int width) : width(width), rank(threadIdx.x % width) {}

  template <class T>
  __device__ T sum(T x) const {
    for (int o = width / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
  }
  /// Ignores NaN.
  template <class T>
  __device__ T max(T x) const {
    for (int o = width / 2; o > 0; o /= 2) x = ::fmax(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
  }
};

/// The largest of a row of n scores.
__device__ inline double row_top(const double* z, int n, Lanes lanes) {
  double top = -INFINITY;
  for (int c = lanes.rank; c < n; c += lanes.width) top = fmax(top, z[c]);
  return lanes.max(top);
}

/// The sum of exp(sharpen (z - top)) over a row.
__device__ inline double sum_of_powers(const double* z, int n, double sharpen, double top,
                                       Lanes lanes) {
  double sum = 0;
  for (int c = lanes.rank; c < n; c += lanes.width) sum += exp(sharpen * (z[c] - top));
  return lanes.sum(sum);
}

struct Entmax {
  double alpha, scale, r;

  __device__ explicit Entmax(double alpha) : alpha(alpha), scale(alpha - 1), r(1 / scale) {}

  /// p of a score and a threshold: exact zeros off the support; NaN stays NaN.
  __device__ double probability(double z, double tau) const {
    if (alpha == 1) return exp(z - tau);
    const double d = scale * z - tau;
    return d <= 0 ? 0.0 : slope(d) * d;
  }
  /// p^(2 - alpha) on the support, 0 off it, of a score and a threshold, or of p.
  __device__ double weight(double z, double tau) const {
    if (alpha == 1) return exp(z - tau);
    const double d = scale * z - tau;
    return d <= 0 ? 0.0 : slope(d);
  }
  __device__ double weight(double p) const {
    if (alpha == 1.5) return sqrt(p);
    return p > 0 ? power(p, 2 - alpha) : 0.0;
  }

  /// The threshold of a row of n scores; for alpha = 1, the log of the softmax's sum.
  __device__ double threshold(const double* z, int n, Lanes lanes) const {
    const double top = row_top(z, n, lanes);
    if (alpha == 1) return top + log(sum_of_powers(z, n, 1, top, lanes));
    double t = scale * top - 1;  // the largest entry alone gives h >= 0 here
    bool moves = n > 0;
    for (int step = 0; step < 100 && __any_sync(0xffffffffu, moves); ++step) {
      double f = 0, df = 0;  // sum of d^r and of d^(r-1)
      for (int c = lanes.rank; moves && c < n; c += lanes.width) {
        const double d = scale * z[c] - t;
        if (!(d > 0)) continue;
        const double s = slope(d);
        f += s * d;
        df += s;
      }
      f = lanes.sum(f);
      df = lanes.sum(df);
      const double norm = r == 2 ? sqrt(f) : (r == 1 ? f : power(f, scale));
      const double next = t + (norm - 1) * f / (norm * df);
      moves = moves && next > t;  // not where it has converged to rounding, or is NaN
      if (moves) t = next;
    }
    return t;
  }

 private:
  __device__ static double power(double x, double exponent) { return exp(exponent * log(x)); }
  /// d^(r - 1), d > 0
  __device__ double slope(double d) const { return r == 2 ? d : (r == 1 ? 1.0 : power(d, r - 1)); }
};

/// p = softmax(z) in place.
__device__ inline void softmax_row(double* z, int n, Lanes lanes) {
  const double top = row_top(z, n, lanes);
  double sum = 0;
  for (int c = lanes.rank; c < n; c += lanes.width) sum += z[c] = exp(z[c] - top);
  sum = lanes.sum(sum);
  for (int c = lanes.rank; c < n; c += lanes.width) z[c] /= sum;
}

}  // namespace entrain::cuda
