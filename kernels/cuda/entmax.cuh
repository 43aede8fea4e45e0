#pragma once
// alpha-entmax of one row (Peters, Niculae, Martins 2019, arXiv 1905.05702) by one warp, in double:
// routing divides by its results, so float's rounding near the threshold would show in the
// gradients. All 32 lanes call these functions together, on a row in shared memory that a barrier
// has made visible to them; all get the same result.
//
// With a = (alpha - 1) z and r = 1 / (alpha - 1): p_c = max(0, a_c - tau)^r, sum p = 1. The
// threshold is the root of h(tau) = ||(a - tau)+||_r - 1, which is convex and decreasing for r >=
// 1, so Newton's steps from the left never overshoot: 4 to 8 of them for alpha = 1.5, a finite
// number for 2.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

/// Shifts a row of n >= 1 scores so that the largest is 0, and returns what that was. It changes no
/// probability, and the threshold, then in [-1, 0], keeps its digits however large the scores are.
__device__ inline double entmax_shift(double* z, int n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double top = -INFINITY;
  for (int c = lane; c < n; c += 32) top = fmax(top, z[c]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    top = fmax(top, __shfl_xor_sync(0xffffffffu, top, offset));
  }
  for (int c = lane; c < n; c += 32) z[c] -= top;
  __syncwarp();
  return top;
}

/// The threshold tau of a shifted row; for alpha = 1, the log of the softmax's sum. kept: scratch
/// of n in shared memory; z itself where it is not needed any more.
__device__ inline double entmax_threshold(const double* z, int n, double alpha, double* kept) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (alpha == 1) {
    double sum = 0;
    for (int c = lane; c < n; c += 32) sum += exp(z[c]);
    return log(warp_sum(sum));
  }
  // tau >= -1, so entries below that are off the support; few are left where routing is sparse.
  const double scale = alpha - 1, r = 1 / scale;
  int m = 0;
  for (int first = 0; first < n; first += 32) {
    const int c = first + lane;
    const double a = c < n ? scale * z[c] : -1;
    const unsigned in = __ballot_sync(0xffffffffu, a > -1);
    if (a > -1) kept[m + __popc(in & ((1u << lane) - 1))] = a;
    m += __popc(in);
  }
  __syncwarp();
  double t = -1;  // the largest entry alone gives h >= 0 here
  for (int step = 0; step < 100; ++step) {
    double f = 0, df = 0;  // sum of d^r and of d^(r-1)
    for (int c = lane; c < m; c += 32) {
      const double d = kept[c] - t;
      if (d <= 0) continue;
      const double power = r == 2 ? d : (r == 1 ? 1 : pow(d, r - 1));
      f += power * d;
      df += power;
    }
    f = warp_sum(f);
    df = warp_sum(df);
    const double norm = r == 2 ? sqrt(f) : (r == 1 ? f : pow(f, scale));
    const double next = t + (norm - 1) * f / (norm * df);
    if (!(next > t)) break;  // converged to rounding, or NaN
    t = next;
  }
  return t;
}

/// p of an entry of a shifted row given its threshold: an exact zero off the support; NaN stays
/// NaN.
__device__ inline double entmax_probability(double z, double tau, double alpha) {
  if (alpha == 1) return exp(z - tau);
  const double d = (alpha - 1) * z - tau;
  if (d <= 0) return 0;
  return alpha == 1.5 ? d * d : (alpha == 2 ? d : pow(d, 1 / (alpha - 1)));
}

/// p^(2 - alpha) on the support: dz = s (dp - sum(s dp) / sum(s)).
__device__ inline double entmax_slope(double p, double alpha) {
  if (alpha == 1.5) return sqrt(p);
  return p > 0 ? pow(p, 2 - alpha) : p;
}

}  // namespace entrain::cuda
