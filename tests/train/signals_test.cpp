#include "train/signals.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

namespace entrain {
namespace {

void stop_politely(int signal) {
  install_signal_handlers();
  if (stop_requested()) std::exit(1);
  raise(signal);
  std::exit(stop_requested() ? 75 : 2);
}

void stop_at_once(int first, int second) {
  install_signal_handlers();
  raise(first);
  raise(second);
  std::exit(0);
}

TEST(SignalsDeathTest, TheFirstOnlyAsks) {
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    EXPECT_EXIT(stop_politely(signal), testing::ExitedWithCode(75), "") << signal;
  }
}

TEST(SignalsDeathTest, TheSecondEndsAtOnce) {
  EXPECT_EXIT(stop_at_once(SIGTERM, SIGTERM), testing::ExitedWithCode(128 + SIGTERM), "");
  EXPECT_EXIT(stop_at_once(SIGTERM, SIGINT), testing::ExitedWithCode(128 + SIGINT), "");
}

}  // namespace
}  // namespace entrain
