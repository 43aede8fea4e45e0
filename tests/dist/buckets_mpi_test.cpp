#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "core/rng.h"
#include "dist/buckets.h"
#include "tests/mpi_main.h"

namespace entrain {
namespace {

/// Passes sums on and notes how long they are.
class Noting final : public Comm {
 public:
  int rank() const override { return world().rank(); }
  int size() const override { return world().size(); }
  int local_rank() const override { return world().local_rank(); }
  Device device() const override { return world().device(); }
  void start_sum(Tensor x) override {
    lengths.push_back(x.numel());
    world().start_sum(x);
  }
  void wait() override { world().wait(); }
  void gather(Tensor) override {}
  void sum(double*, int) override {}
  void max(double*, int) override {}
  void broadcast(void*, size_t, int) override {}
  void fail_together() override {}
  bool recover() override { return false; }

  std::vector<int64_t> lengths;
};

std::vector<float> noise() {
  Rng rng(3, static_cast<uint64_t>(world().rank()));
  std::vector<float> values(1000);
  for (float& v : values) v = static_cast<float>(rng.normal());
  for (size_t i = 390; i < 400; ++i) values[i] = 0;  // a gap
  return values;
}

const std::vector<std::pair<int64_t, int64_t>> stretches{
    {900, 100}, {600, 300}, {400, 200}, {200, 190}, {190, 10}, {0, 190}};  // begin, length

TEST(Buckets, MergeUntilAMessageIsWorthItsStart) {
  Floats one(noise()), merged(noise());
  world().start_sum(one.tensor());
  world().wait();
  Noting comm;
  Buckets buckets(comm, 400 * sizeof(float));
  for (const auto& [begin, length] : stretches)
    buckets.add(merged.tensor().slice(0, begin, length));
  EXPECT_EQ(comm.lengths, (std::vector<int64_t>{400, 400})) << "the rest waits";
  buckets.wait();
  EXPECT_EQ(comm.lengths, (std::vector<int64_t>{400, 400, 200}));
  const std::vector<float> sums = merged.values(), expected = one.values();
  for (size_t i = 0; i < sums.size(); ++i) {
    ASSERT_NEAR(sums[i], expected[i], 1e-5) << i;
  }
  buckets.wait();  // nothing is left to start
  EXPECT_EQ(comm.lengths.size(), 3u);
}

TEST(Buckets, SumsAreBitwiseTheSameAgain) {
  std::vector<float> before;
  for (int repeat = 0; repeat < 3; ++repeat) {
    Floats floats(noise());
    Buckets buckets(world(), 500 * sizeof(float));
    for (const auto& [begin, length] : stretches) {
      buckets.add(floats.tensor().slice(0, begin, length));
    }
    buckets.wait();
    if (repeat > 0) {
      EXPECT_EQ(floats.values(), before);
    }
    before = floats.values();
  }
}

TEST(Buckets, WaitingForALateRankIsMeasured) {
  if (world().size() == 1) GTEST_SKIP() << "nobody to wait for";
  Floats floats(noise());
  Buckets buckets(world());
  double none = 0;
  world().sum(&none, 1);  // ranks begin together
  if (world().rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));
  buckets.add(floats.tensor());
  buckets.wait();
  floats.values();  // which waits for the GPU
  if (world().rank() > 0) {
    EXPECT_GT(buckets.waited_seconds(), 0.2);
  }
}

TEST(Buckets, StretchesComeFromBackToFront) {
  Floats floats(noise());
  Buckets buckets(world());
  buckets.add(floats.tensor().slice(0, 0, 10));
  EXPECT_THROW(buckets.add(floats.tensor().slice(0, 5, 10)), Error);
}

}  // namespace
}  // namespace entrain
