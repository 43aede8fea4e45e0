#pragma once
// alpha-entmax of rows in shared memory, in float: what routes bf16 queries. entmax_row.cuh is the
// same in double, kernels/cpu/entmax.h has the mathematics.
//
// A row holds a = (alpha - 1) z, or z for alpha = 1, and -infinity from its last entry up to a
// multiple of four: lanes share it, eight unless said otherwise, four neighbouring entries each at
// a time.
#include "kernels/cuda/entmax_row.cuh"

namespace entrain::cuda {

constexpr int row_lanes = 8;

/// Calls f(four entries, their first column) for a lane's entries of the first n of a row.
template <int width = row_lanes, class F>
__device__ __forceinline__ void for_fours(float* row, int n, F f) {
#pragma unroll 2
  for (int c = 4 * (threadIdx.x % width); c < n; c += 4 * width) {
    f(*reinterpret_cast<float4*>(row + c), c);
  }
}

/// The largest entry of a row, whatever NaN there is.
template <int width = row_lanes>
__device__ inline float row_top(float* row, int n) {
  float top = -INFINITY;
  for_fours<width>(row, n, [&](const float4& a, int) {
    top = fmaxf(fmaxf(top, fmaxf(a.x, a.y)), fmaxf(a.z, a.w));
  });
  return Lanes(width).max(top);
}

/// Makes scores of a row's first n products, -infinity before the first candidate and from the n-th
/// on. Returns the largest.
template <int width>
__device__ float scale_row(float* row, int begin, int n, float factor) {
  float top = -INFINITY;
  for_fours<width>(row, n, [&](const float4& at, int c) {
    const auto score = [&](float product, int column) {
      const float z = column >= begin && column < n ? factor * product : -INFINITY;
      top = fmaxf(top, z);  // passes over NaN
      return z;
    };
    *reinterpret_cast<float4*>(row + c) =
        make_float4(score(at.x, c), score(at.y, c + 1), score(at.z, c + 2), score(at.w, c + 3));
  });
  return Lanes(width).max(top);
}

/// Shifts a row by its top and drops entries of `least` after that or less: each lane moves the
/// others of its own together. Returns how far the lane's row then goes.
template <int width>
__device__ int keep_above(float* row, int n, float top, float least) {
  float* const own = row + 4 * Lanes(width).rank;
  int kept = 0;
  const auto keep = [&](float x) {
    own[kept / 4 * 4 * width + kept % 4] = x;
    ++kept;
  };
  for_fours<width>(row, n, [&](const float4& at, int) {
    const float4 four = at;
    for (const float x : {four.x, four.y, four.z, four.w}) {
      if (!(x - top <= least)) keep(x - top);  // NaN stays
    }
  });
  while (n > 0 && (kept == 0 || kept % 4 > 0)) keep(-INFINITY);
  return kept * width;
}

/// What p is of d = a - tau: p = d^r, r = 1 / (alpha - 1), so that loops are written once and run
/// without branches.
enum class Curve {
  exponential,  // alpha = 1: e^d
  square,       // 1.5
  line,         // 2
  power
};

template <Curve curve>
struct FloatEntmax {
  float alpha_1, r_1;  // alpha - 1, r - 1
  float enough;        // a step of Newton's this small is the last

  /// Below alpha = 1.5 steps square the error, n / 2 times the step's square at most; above it h
  /// has kinks, and steps go on until they find none to cross.
  __device__ explicit FloatEntmax(double alpha)
      : alpha_1(static_cast<float>(alpha - 1)),
        r_1(static_cast<float>(1 / (alpha - 1) - 1)),
        enough(alpha <= 1.5 ? 0x1p-16f : 0) {}

  /// p, exact zeros off the support; NaN stays NaN.
  __device__ float probability(float a, float tau) const {
    const float d = a - tau;
    if (curve == Curve::exponential) return expf(d);
    return d <= 0 ? 0.0f : slope(d) * d;
  }
  /// p^(2 - alpha) on the support, 0 off it.
  __device__ float weight(float a, float tau) const {
    const float d = a - tau;
    if (curve == Curve::exponential) return expf(d);
    return d <= 0 ? 0.0f : slope(d);
  }

  /// The threshold of a row from a lower bound on: its largest entry less 1, or what it had with
  /// fewer entries. All lanes of a warp together.
  template <int width = row_lanes>
  __device__ float threshold(float* row, int n, float bound) const {
    const Lanes lanes(width);
    if (curve == Curve::exponential) {
      float sum = 0;
      for_fours<width>(row, n, [&](const float4& a, int) {
        sum += expf(a.x - bound) + expf(a.y - bound) + (expf(a.z - bound) + expf(a.w - bound));
      });
      return bound + logf(lanes.sum(sum));
    }
    float t = bound;  // the largest entry alone gives h >= 0 here
    bool moves = n > 0;
    for (int step = 0; step < most_steps && __any_sync(0xffffffffu, moves); ++step) {
      float f = 0, df = 0, f2 = 0, df2 = 0;
      for_fours<width>(row, moves ? n : 0, [&](const float4& a, int) {
        add(a.x - t, f, df);
        add(a.y - t, f2, df2);
        add(a.z - t, f, df);
        add(a.w - t, f2, df2);
      });
      f = lanes.sum(f + f2);
      df = lanes.sum(df + df2);
      moves = moves && improve(t, f, df);
    }
    return t;
  }

  static constexpr int most_steps = 100;
  /// Adds d^r to f and d^(r-1) to df where d > 0.
  __device__ void add(float d, float& f, float& df) const {
    if (curve == Curve::square) {
      d = fmaxf(d, 0);  // 0 for NaN
      f += d * d;
      df += d;
    } else if (d > 0) {
      const float s = slope(d);
      f += s * d;
      df += s;
    }
  }
  /// A step of Newton's from t, given the sums over a row; whether another is to follow.
  __device__ bool improve(float& t, float f, float df) const {
    const float norm = curve == Curve::square ? sqrtf(f)
                       : curve == Curve::line ? f
                                              : exp2f(alpha_1 * log2f(f));
    const float next = t + __fdividef((norm - 1) * f, norm * df), moved = next - t;
    if (!(next > t)) return false;  // it has converged to rounding, or is NaN
    t = next;
    return moved > enough;
  }

 private:
  /// d^(r - 1), d > 0
  __device__ float slope(float d) const {
    if (curve == Curve::square) return d;
    return curve == Curve::line ? 1.0f : exp2f(r_1 * log2f(d));
  }
};

/// Calls f with alpha's entmax.
template <class F>
__device__ __forceinline__ void by_curve(double alpha, F f) {
  if (alpha == 1.5) {
    f(FloatEntmax<Curve::square>(alpha));
  } else if (alpha == 2) {
    f(FloatEntmax<Curve::line>(alpha));
  } else if (alpha == 1) {
    f(FloatEntmax<Curve::exponential>(alpha));
  } else {
    f(FloatEntmax<Curve::power>(alpha));
  }
}

}  // namespace entrain::cuda
