#include <gtest/gtest.h>

#include <numeric>

#include "kernels/kernels.h"
#include "tests/support.h"

namespace entrain {
namespace {

const Kernels<Device::cpu> kernels;
constexpr double alphas[] = {1, 1.1, 1.25, 1.5, 1.75, 1.9, 2};

Tensor full_length(Pool& pool, const Tensor& z) {
  const Tensor length = pool.make({z[0]}, DType::i32);
  std::fill_n(length.ptr<int32_t>(), z[0], static_cast<int32_t>(z[1]));
  return length;
}

Tensor entmax(Pool& pool, const Tensor& z, double alpha) {
  const Tensor p = pool.make(z.shape, z.dtype);
  fill(p, NAN);
  kernels.entmax(z, full_length(pool, z), alpha, p);
  return p;
}

std::vector<double> entmax(const std::vector<double>& scores, double alpha) {
  Pool pool;
  const Tensor z = pool.make({1, static_cast<int64_t>(scores.size())});
  std::copy(scores.begin(), scores.end(), z.ptr<double>());
  return values(entmax(pool, z, alpha));
}

double sum(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0);
}

std::vector<double> softmax(const std::vector<double>& z) {
  const double top = *std::max_element(z.begin(), z.end());
  std::vector<double> p;
  for (const double x : z) p.push_back(std::exp(x - top));
  const double total = sum(p);
  for (double& x : p) x /= total;
  return p;
}

// Martins and Astudillo 2016: project onto the simplex by sorting.
std::vector<double> sparsemax(const std::vector<double>& z) {
  std::vector<double> sorted = z;
  std::sort(sorted.rbegin(), sorted.rend());
  double cumulative = 0, tau = 0;
  for (size_t k = 0; k < sorted.size(); ++k) {
    cumulative += sorted[k];
    const auto n = static_cast<double>(k + 1);
    if (1 + n * sorted[k] > cumulative) tau = (cumulative - 1) / n;
  }
  std::vector<double> p;
  for (const double x : z) p.push_back(std::max(0.0, x - tau));
  return p;
}

TEST(Entmax, SumsToOneKeepsTheOrderAndTheDefinition) {
  const Threads one(1);
  for (const double alpha : alphas) {
    for (const int64_t n : {1, 2, 7, 64, 257}) {
      for (const double scale : {1e-6, 0.1, 1.0, 30.0, 1e6}) {
        SCOPED_TRACE(fmt::format("alpha {} n {} scale {}", alpha, n, scale));
        Pool pool;
        const Tensor z = pool.random({3, n}, scale), p = entmax(pool, z, alpha);
        for (int64_t row = 0; row < 3; ++row) {
          const std::vector<double> x = values(z.slice(0, row, 1)), y = values(p.slice(0, row, 1));
          EXPECT_NEAR(sum(y), 1, 1e-9);
          // On the support (alpha - 1) z - p^(alpha - 1) is the threshold, which the rest is below.
          const double inverse = alpha - 1, top = *std::max_element(x.begin(), x.end());
          const auto best = static_cast<size_t>(std::max_element(y.begin(), y.end()) - y.begin());
          const double tau = inverse * (x[best] - top) - std::pow(y[best], inverse);
          for (size_t c = 0; c < x.size(); ++c) {
            EXPECT_GE(y[c], 0);
            for (size_t other = 0; other < c; ++other) {
              EXPECT_EQ(x[c] > x[other] && y[c] < y[other], false);
            }
            if (alpha == 1) continue;
            const double a = inverse * (x[c] - top) - tau;
            EXPECT_NEAR(y[c], a > 0 ? std::pow(a, 1 / inverse) : 0, 1e-9);
          }
        }
      }
    }
  }
}

TEST(Entmax, IsSoftmaxAtOneAndSparsemaxAtTwo) {
  Pool pool;
  for (const int64_t n : {1, 5, 100}) {
    for (const double scale : {0.01, 1.0, 10.0}) {
      const std::vector<double> z = values(pool.random({n}, scale));
      EXPECT_LT(relative_error(entmax(z, 1), softmax(z)), 1e-14);
      EXPECT_LT(relative_error(entmax(z, 2), sparsemax(z)), 1e-14);
      EXPECT_LT(relative_error(entmax(z, 1 + 1e-5), softmax(z)), 1e-3);
      EXPECT_LT(relative_error(entmax(z, 2 - 1e-6), sparsemax(z)), 1e-4);
    }
  }
}

TEST(Entmax, IsInvariantToShifts) {
  Pool pool;
  for (const double alpha : alphas) {
    std::vector<double> z = values(pool.random({50}));
    const std::vector<double> p = entmax(z, alpha);
    for (double& x : z) x += 1000;
    EXPECT_LT(relative_error(entmax(z, alpha), p), 1e-11) << alpha;
  }
}

TEST(Entmax, TiesShareAndOneElementTakesAll) {
  for (const double alpha : alphas) {
    EXPECT_EQ(entmax({-17.0}, alpha), std::vector<double>{1});
    for (const double x : entmax({3, 3, 3, 3, 3}, alpha)) EXPECT_NEAR(x, 0.2, 1e-14) << alpha;
    const std::vector<double> two = entmax({1000, 1000, 0}, alpha);
    EXPECT_NEAR(two[0], 0.5, 1e-12) << alpha;
    EXPECT_EQ(two[0], two[1]);
    EXPECT_EQ(two[2], 0);
  }
}

TEST(Entmax, ZerosAreExact) {
  const std::vector<double> p = entmax({4, 1, 0.9}, 1.5);  // 4 leads by more than 1 / (alpha - 1)
  EXPECT_EQ(p, (std::vector<double>{1, 0, 0}));
  EXPECT_GT(entmax({4, 1, 0.9}, 1)[2], 0);
}

TEST(Entmax, HugeAndTinyScores) {
  for (const double alpha : alphas) {
    for (const double huge : {1e20, 1e300}) {
      EXPECT_EQ(entmax({-huge, huge, 0}, alpha), (std::vector<double>{0, 1, 0})) << alpha;
      EXPECT_NEAR(sum(entmax({huge, huge, huge}, alpha)), 1, 1e-12) << alpha;
    }
    for (const double x : entmax({1e-300, -1e-300, 0, 5e-324}, alpha)) EXPECT_NEAR(x, 0.25, 1e-14);
  }
}

TEST(Entmax, RowsEndAtTheirLengthAndEmptyOnesGiveNothing) {
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    const Tensor z = pool.random({3, 5}), p = pool.make({3, 5}),
                 length = pool.make({3}, DType::i32);
    length.ptr<int32_t>()[1] = 2;
    length.ptr<int32_t>()[2] = 5;
    put(z, 7, NAN);  // beyond the length of row 1
    put(z, 8, 1e30);
    fill(p, NAN);
    kernels.entmax(z, length, 1.5, p);
    EXPECT_EQ(values(p.slice(0, 0, 1)), std::vector<double>(5, 0.0));
    EXPECT_NEAR(sum(values(p.slice(0, 1, 1).slice(1, 0, 2))), 1, 1e-6);
    EXPECT_EQ(values(p.slice(0, 1, 1).slice(1, 2, 3)), std::vector<double>(3, 0.0));
    EXPECT_NEAR(sum(values(p.slice(0, 2, 1))), 1, 1e-6);

    const Tensor dz = pool.make({3, 5});
    fill(dz, NAN);
    kernels.entmax_backward(p, pool.random({3, 5}), 1.5, dz);
    EXPECT_EQ(values(dz.slice(0, 0, 1)), std::vector<double>(5, 0.0));
    EXPECT_EQ(values(dz.slice(0, 1, 1).slice(1, 2, 3)), std::vector<double>(3, 0.0));
  }
}

TEST(Entmax, GradientWhereTheSupportIsStable) {
  const Threads one(1);
  constexpr double h = 1e-5;
  for (const double alpha : alphas) {
    for (const int64_t n : {1, 6, 40}) {
      Pool pool;
      const Tensor z = pool.random({1, n}, 2), dp = pool.random({1, n}), dz = pool.make({1, n});
      const std::vector<double> p = values(entmax(pool, z, alpha));
      const auto support = [&] {
        std::vector<bool> in;
        for (const double x : values(entmax(pool, z, alpha))) in.push_back(x > 0);
        return in;
      };
      kernels.entmax_backward(entmax(pool, z, alpha), dp, alpha, dz);
      const std::vector<bool> before = support();
      std::vector<double> actual, expected;
      for (int64_t i = 0; i < n; ++i) {
        bool stable = true;
        const auto loss = [&] {
          stable = stable && support() == before;
          const std::vector<double> y = values(entmax(pool, z, alpha));
          double result = 0;
          for (int64_t c = 0; c < n; ++c) result += y[static_cast<size_t>(c)] * get(dp, c);
          return result;
        };
        expected.push_back(slope(z, i, loss, h));
        actual.push_back(get(dz, i));
        ASSERT_TRUE(stable) << "another seed is needed";
      }
      EXPECT_LT(relative_error(actual, expected), 1e-6) << "alpha " << alpha << " n " << n;
      EXPECT_NEAR(sum(values(dz)), 0, 1e-12);
    }
  }
}

}  // namespace
}  // namespace entrain
