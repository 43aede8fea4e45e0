#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/cpu/math.h"

namespace entrain {
namespace {

template <class T>
void expect_exp(T low, T high) {
  const T ulp = std::numeric_limits<T>::epsilon();
  for (int i = 0; i <= 100000; ++i) {
    const T x = low + (high - low) * static_cast<T>(i) / 100000;
    const T exact = std::exp(x);
    ASSERT_NEAR(fast_exp(x) / exact, T{1}, 2 * ulp) << "x = " << x;
  }
  EXPECT_EQ(fast_exp(T{0}), T{1});
  EXPECT_EQ(fast_exp(low - 1), T{0});
  EXPECT_EQ(fast_exp(-std::numeric_limits<T>::infinity()), T{0});
  EXPECT_EQ(fast_exp(std::numeric_limits<T>::infinity()), std::numeric_limits<T>::infinity());
  EXPECT_TRUE(std::isnan(fast_exp(std::numeric_limits<T>::quiet_NaN())));
}

TEST(FastExp, Float) {
  expect_exp(-87.3F, 88.0F);
}

TEST(FastExp, Double) {
  expect_exp(-708.0, 709.0);
}

}  // namespace
}  // namespace entrain
