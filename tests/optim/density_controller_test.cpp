#include "optim/density_controller.h"

#include <gtest/gtest.h>

#include <cmath>

namespace entrain {
namespace {

// Density as routing shows it: falls with gamma, down to a floor.
double density(double gamma) {
  return 0.05 + 0.95 / (1 + std::pow(gamma, 0.8));
}

TEST(DensityController, SettlesAtTheTargetFromEitherSide) {
  for (const double target : {0.1, 0.25, 0.6}) {
    for (const double start : {0.05, 1.0, 50.0}) {
      DensityController controller(target, start);
      double gamma = start;
      for (int step = 0; step < 1000; ++step) gamma = controller.update(density(gamma));
      EXPECT_NEAR(density(gamma), target, 0.01 * target) << target << " from " << start;
      for (int step = 0; step < 50; ++step) {  // and stays
        gamma = controller.update(density(gamma));
        EXPECT_NEAR(density(gamma), target, 0.01 * target);
      }
    }
  }
}

TEST(DensityController, MovesSmoothly) {
  DensityController controller(0.2, 1);
  double before = 1;
  for (int step = 0; step < 100; ++step) {
    const double noise = step % 2 == 0 ? 1.3 : 0.7;
    const double gamma = controller.update(std::min(1.0, noise * density(before)));
    EXPECT_LT(std::abs(std::log(gamma / before)), 0.2) << step;
    before = gamma;
  }
}

TEST(DensityController, ContinuesFromItsState) {
  DensityController whole(0.2, 1), first(0.2, 1), second(0.2, 99);
  double gamma = 1;
  for (int step = 0; step < 20; ++step) {
    whole.update(density(gamma));
    if (step == 10) second.restore(first.state());
    gamma = (step < 10 ? first : second).update(density(gamma));
    EXPECT_EQ(gamma, whole.state().gamma) << step;
  }
  EXPECT_EQ(second.state().density, whole.state().density);
}

TEST(DensityController, SurvivesExtremes) {
  DensityController controller(0.2, 1);
  for (int step = 0; step < 2000; ++step) controller.update(0);  // nothing attended
  EXPECT_GT(controller.state().gamma, 0);
  for (int step = 0; step < 5000; ++step) controller.update(1);
  EXPECT_TRUE(std::isfinite(controller.state().gamma));
  EXPECT_GT(controller.state().gamma, 1);
}

}  // namespace
}  // namespace entrain
