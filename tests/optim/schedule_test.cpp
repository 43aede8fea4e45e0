#include "optim/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/expect_error.h"

namespace entrain {
namespace {

OptimConfig config(const char* schedule) {
  OptimConfig c;
  c.lr = 2;
  c.min_lr = 0.5;
  c.warmup = 10;
  c.schedule = schedule;
  return c;
}

TEST(Schedule, RisesToThePeakThenFallsToTheMinimum) {
  for (const char* schedule : {"cosine", "linear", "constant"}) {
    const OptimConfig c = config(schedule);
    EXPECT_DOUBLE_EQ(learning_rate(c, 1, 110), 0.2) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(c, 5, 110), 1) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(c, 10, 110), 2) << schedule;
  }
  EXPECT_DOUBLE_EQ(learning_rate(config("cosine"), 60, 110), 1.25);
  EXPECT_NEAR(learning_rate(config("cosine"), 35, 110), 0.5 + 1.5 * (2 + std::sqrt(2)) / 4, 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate(config("cosine"), 110, 110), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(config("linear"), 60, 110), 1.25);
  EXPECT_DOUBLE_EQ(learning_rate(config("linear"), 35, 110), 1.625);
  EXPECT_DOUBLE_EQ(learning_rate(config("linear"), 110, 110), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(config("constant"), 110, 110), 2);
}

TEST(Schedule, HoldsAtTheEdges) {
  OptimConfig c = config("cosine");
  EXPECT_DOUBLE_EQ(learning_rate(c, 120, 110), 0.5) << "past the end";
  EXPECT_DOUBLE_EQ(learning_rate(c, 10, 10), 2) << "warm-up to the last step";
  c.warmup = 0;
  EXPECT_LE(learning_rate(c, 1, 100), 2);
  EXPECT_GT(learning_rate(c, 1, 100), 1.99);
  EXPECT_DOUBLE_EQ(learning_rate(c, 1, 1), 0.5);
  EXPECT_ERROR(learning_rate(config("cosin"), 50, 100), "unknown train.schedule cosin");
}

TEST(Schedule, RampsAndStays) {
  EXPECT_DOUBLE_EQ(ramp(1.25, 1.5, 10, 1), 1.25);
  EXPECT_DOUBLE_EQ(ramp(1.25, 1.5, 10, 6), 1.375);
  EXPECT_DOUBLE_EQ(ramp(1.25, 1.5, 10, 11), 1.5);
  EXPECT_DOUBLE_EQ(ramp(1.25, 1.5, 10, 500), 1.5);
  EXPECT_DOUBLE_EQ(ramp(1.25, 1.5, 0, 1), 1.5);
}

}  // namespace
}  // namespace entrain
