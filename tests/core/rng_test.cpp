#include "core/rng.h"

#include <gtest/gtest.h>

#include <cmath>

namespace entrain {
namespace {

TEST(Rng, RestoresItsPosition) {
  Rng a(7, 1);
  for (int i = 0; i < 5; ++i) a.next();
  Rng b(0, 0);
  b.restore(a.state());
  EXPECT_EQ(a.next(), b.next());
}

TEST(Rng, StreamsAndSeedsDiffer) {
  EXPECT_NE(Rng(1, 1).next(), Rng(1, 2).next());
  EXPECT_NE(Rng(1, 1).next(), Rng(2, 1).next());
}

TEST(Rng, NormalHasUnitVariance) {
  Rng rng(3, 0);
  double sum = 0, squares = 0;
  const int n = 100000;
  for (int i = 0; i < n; ++i) {
    const double x = rng.normal();
    sum += x, squares += x * x;
  }
  EXPECT_NEAR(sum / n, 0.0, 0.02);
  EXPECT_NEAR(squares / n, 1.0, 0.02);
}

}  // namespace
}  // namespace entrain
