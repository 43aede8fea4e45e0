#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/rng.h"
#include "dist/comm.h"
#include "tests/mpi_main.h"
#include "train/together.h"

namespace entrain {
namespace {

std::vector<float> summed(const std::vector<float>& values) {
  Floats floats(values);
  world().start_sum(floats.tensor());
  world().wait();
  return floats.values();
}

std::vector<float> noise(size_t count, int rank) {
  Rng rng(11, static_cast<uint64_t>(rank));
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(rng.normal() * std::exp(4 * rng.normal()));
  return values;
}

TEST(MpiComm, HasTheRanksThatWereAskedFor) {
  const char* expected = std::getenv("EXPECTED_RANKS");
  if (!expected) GTEST_SKIP() << "EXPECTED_RANKS is not set";
  EXPECT_EQ(world().size(), std::atoi(expected));
  EXPECT_LT(world().rank(), world().size());
}

TEST(MpiComm, SumsSeveralTensorsInFlight) {
  const int n = world().size();
  std::vector<Floats> tensors;
  for (size_t b = 0; b < 7; ++b) {
    std::vector<float> values(1 + 10000 * b);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>((world().rank() + 1) * static_cast<int>(i % 100 + b));
    }
    tensors.emplace_back(values);
  }
  for (const Floats& t : tensors) world().start_sum(t.tensor());
  world().wait();
  for (size_t b = 0; b < tensors.size(); ++b) {
    const std::vector<float> sums = tensors[b].values();
    for (size_t i = 0; i < sums.size(); ++i) {
      ASSERT_EQ(sums[i], n * (n + 1) / 2 * static_cast<int>(i % 100 + b));
    }
  }
}

// Longer than one part of the split in mpi.cpp, and not a multiple of it.
TEST(MpiComm, SumsTensorsLongerThanOneMessage) {
  std::vector<float> values((size_t{1} << 22) + 12345);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 1000);
  values = summed(values);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(values[i], static_cast<float>(world().size() * static_cast<int>(i % 1000))) << i;
  }
}

TEST(MpiComm, SumsAreBitwiseEqualOnAllRanksAndRepeat) {
  for (const size_t count : {size_t{1}, size_t{17}, size_t{1000}, size_t{300000}}) {
    std::vector<float> first;
    for (int repeat = 0; repeat < 4; ++repeat) {
      const auto values = summed(noise(count, world().rank()));
      auto of_rank0 = values;
      world().broadcast(of_rank0.data(), count * sizeof(float), 0);
      EXPECT_EQ(std::memcmp(values.data(), of_rank0.data(), count * sizeof(float)), 0) << count;
      if (repeat == 0) first = values;
      EXPECT_EQ(std::memcmp(values.data(), first.data(), count * sizeof(float)), 0) << count;
    }
  }
}

TEST(MpiComm, SumIsThatOfAllRanks) {
  const size_t count = 5000;
  const auto values = summed(noise(count, world().rank()));
  std::vector<double> exact(count), magnitude(count);
  for (int r = 0; r < world().size(); ++r) {
    const auto part = noise(count, r);
    for (size_t i = 0; i < count; ++i) exact[i] += part[i], magnitude[i] += std::abs(part[i]);
  }
  for (size_t i = 0; i < count; ++i) EXPECT_NEAR(values[i], exact[i], 1e-6 * magnitude[i]);
}

TEST(MpiComm, WaitWithoutSumsReturns) {
  world().wait();
}

TEST(MpiComm, GathersARowOfEachRank) {
  const int64_t n = world().size(), width = 1000;
  std::vector<float> values(static_cast<size_t>(n * width), -1);
  const auto begin = values.begin() + world().rank() * width;
  std::fill(begin, begin + width, static_cast<float>(world().rank()));
  Floats floats(values);
  world().gather(floats.tensor().view({n, width}));
  values = floats.values();
  for (int64_t i = 0; i < n * width; ++i) {
    ASSERT_EQ(values[static_cast<size_t>(i)], static_cast<float>(i / width));
  }
}

TEST(MpiComm, NumbersTheRanksOfAHost) {
  EXPECT_EQ(world().local_rank(), world().rank());  // all tests run on one
}

TEST(MpiComm, ReducesSmallHostValues) {
  const int n = world().size(), rank = world().rank();
  double sums[] = {1.0, static_cast<double>(rank)};
  world().sum(sums, 2);
  EXPECT_EQ(sums[0], n);
  EXPECT_EQ(sums[1], n * (n - 1) / 2);
  double largest[] = {static_cast<double>(rank), static_cast<double>(-rank)};
  world().max(largest, 2);
  EXPECT_EQ(largest[0], n - 1);
  EXPECT_EQ(largest[1], 0);
}

TEST(MpiComm, BroadcastsFromEveryRoot) {
  for (int root = 0; root < world().size(); ++root) {
    std::vector<int> data(1000);
    if (world().rank() == root) std::iota(data.begin(), data.end(), root);
    world().broadcast(data.data(), data.size() * sizeof(int), root);
    EXPECT_EQ(data.front(), root);
    EXPECT_EQ(data.back(), root + 999);
  }
}

TEST(MpiComm, RequireSameAcceptsEqualTexts) {
  EXPECT_NO_THROW(require_same(world(), "configuration", "lr: 1\nsteps: 2\n"));
  EXPECT_NO_THROW(require_same(world(), "configuration", ""));
}

TEST(MpiComm, RequireSameNamesTheDifferingRankOnEveryRank) {
  const int last = world().size() - 1;
  if (last == 0) GTEST_SKIP() << "one rank cannot differ from itself";
  const bool differs = world().rank() == last;
  try {
    require_same(world(), "configuration", differs ? "lr: 1\nsteps: 3\n" : "lr: 1\nsteps: 2\n");
    ADD_FAILURE() << "accepted on rank " << world().rank();
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find("rank " + std::to_string(last) + " has another configuration"),
              std::string::npos)
        << what;
    EXPECT_NE(what.find("'steps: 3' instead of 'steps: 2'"), std::string::npos) << what;
  }
  // Texts of which one begins the other.
  EXPECT_THROW(require_same(world(), "name", differs ? "step_1" : "step_10"), Error);
  EXPECT_THROW(require_same(world(), "name", differs ? "a\n" : "a"), Error);
}

TEST(MpiComm, RecoversFromWhatAllRanksThrow) {
  const auto fails = [](int where) {
    together(world(), [&] {
      if (world().rank() == where) fail("this rank fails");
    });
  };
  for (int where = 0; where < world().size(); ++where) {
    EXPECT_THROW(fails(where), Error);
    EXPECT_TRUE(world().recover());
    EXPECT_FALSE(world().recover()) << "nothing has failed since";
    double one = 1;
    world().sum(&one, 1);
  }
}

// Run by a test of its own without catching exceptions: mpirun must end the ranks that wait.
TEST(MpiComm, DISABLED_ARankThatFailsAloneEndsTheRun) {
  if (world().rank() == world().size() - 1) fail("this rank fails");
  double x = 0;
  world().sum(&x, 1);
}

}  // namespace
}  // namespace entrain
