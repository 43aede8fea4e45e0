#include "core/stopwatch.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "core/arena.h"
#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

void lap(Stopwatch& watch, int milliseconds) {
  watch.start();
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  watch.stop();
}

TEST(Stopwatch, AddsLapsAndLeavesOutWhatIsBetween) {
  Stopwatch watch(Device::cpu);
  EXPECT_EQ(watch.seconds(), 0);
  const auto begin = std::chrono::steady_clock::now();
  lap(watch, 5);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  lap(watch, 5);
  const std::chrono::duration<double> all = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(watch.seconds(), 0.01);
  EXPECT_LE(watch.seconds(), all.count() - 0.05);
}

TEST(Stopwatch, StartsOver) {
  Stopwatch watch(Device::cpu);
  lap(watch, 20);
  watch.reset();
  EXPECT_EQ(watch.seconds(), 0);
  lap(watch, 1);
  EXPECT_GE(watch.seconds(), 0.001);
}

// Events take times anew whenever the graph that records them runs.
TEST(Stopwatch, TimesTheWorkOfAGraph) {
  NEEDS_GPU();
  const size_t bytes = size_t{64} << 20;
  const Buffer memory(bytes, Device::cuda);
  Stopwatch watch(Device::cuda);
  gpu::Graph graph;
  graph.capture([&] {
    watch.reset();
    watch.start();
    gpu::zero(memory.data(), bytes);
    watch.stop();
  });
  for (int i = 0; i < 2; ++i) {
    graph.launch();
    gpu::synchronize();
    EXPECT_GT(watch.seconds(), 0);
    EXPECT_LT(watch.seconds(), 1);
  }
}

}  // namespace
}  // namespace entrain
