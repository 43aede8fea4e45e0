#include "model/token_choice.h"

#include <map>

#include "tests/expect_error.h"
#include "tests/support.h"

namespace entrain {
namespace {

struct Logits {
  explicit Logits(const std::vector<double>& z, DType real = DType::f64) : pool(real) {
    tensor = pool.make({1, std::ssize(z)});
    for (size_t i = 0; i < z.size(); ++i) put(tensor, static_cast<int64_t>(i), z[i]);
  }
  Pool pool;
  Tensor tensor;
};

/// The share of each token in so many draws.
std::map<int32_t, double> shares(const std::vector<double>& probabilities, double temperature,
                                 double top_p) {
  std::vector<double> z = probabilities;
  for (double& x : z) x = std::log(x);
  const Logits logits(z);
  TokenChoice choice(temperature, top_p, 7);
  std::map<int32_t, double> shares;
  for (int i = 0; i < 20000; ++i) shares[choice.choose(logits.tensor)] += 1 / 20000.0;
  return shares;
}

TEST(TokenChoice, TemperatureZeroTakesTheLikeliest) {
  for (const DType real : {DType::f32, DType::f64}) {
    TokenChoice greedy(0, 1, 1);
    EXPECT_EQ(greedy.choose(Logits({1, 3, 2, 3, -5}, real).tensor), 1) << "the lower of equals";
    EXPECT_EQ(greedy.choose(Logits({-9}, real).tensor), 0);
  }
}

TEST(TokenChoice, DrawsByProbability) {
  const auto s = shares({0.5, 0.1, 0.4}, 1, 1);
  EXPECT_NEAR(s.at(0), 0.5, 0.02);
  EXPECT_NEAR(s.at(1), 0.1, 0.02);
  EXPECT_NEAR(s.at(2), 0.4, 0.02);
}

TEST(TokenChoice, TemperatureSharpens) {
  const auto s = shares({0.6, 0.4}, 0.5, 1);
  EXPECT_NEAR(s.at(0), 0.36 / (0.36 + 0.16), 0.02);
  EXPECT_EQ(shares({0.6, 0.4}, 1e-300, 1).size(), 1u) << "near 0 without overflow";
}

TEST(TokenChoice, TopPKeepsTheFewestThatHaveTheShare) {
  const std::vector<double> p{0.1, 0.3, 0.05, 0.35, 0.2};
  const auto kept = [&](double top_p) {
    std::vector<int32_t> ids;
    for (const auto& [id, share] : shares(p, 1, top_p)) ids.push_back(id);
    return ids;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(kept(1e-9), Ids({3}));
  EXPECT_EQ(kept(0.349), Ids({3}));
  EXPECT_EQ(kept(0.351), Ids({1, 3}));
  EXPECT_EQ(kept(0.649), Ids({1, 3}));
  EXPECT_EQ(kept(0.651), Ids({1, 3, 4}));
  EXPECT_EQ(kept(0.951), Ids({0, 1, 2, 3, 4}));
  EXPECT_NEAR(shares(p, 1, 0.6).at(1), 0.3 / 0.65, 0.02) << "renormalised";
  EXPECT_EQ(shares({0.25, 0.25, 0.25, 0.25}, 1, 0.4).rbegin()->first, 1) << "lower ids of equals";
}

TEST(TokenChoice, ImpossibleTokensAreNeverDrawn) {
  TokenChoice choice(1, 1, 3);
  const Logits logits({-2000, 0, 0, -2000});
  for (int i = 0; i < 1000; ++i) {
    const int32_t id = choice.choose(logits.tensor);
    EXPECT_TRUE(id == 1 || id == 2);
  }
}

TEST(TokenChoice, TheSeedDecides) {
  const Logits logits(std::vector<double>(50, 1.0));
  const auto draw = [&](uint64_t seed) {
    TokenChoice choice(1, 0.9, seed);
    std::vector<int32_t> ids;
    for (int i = 0; i < 20; ++i) ids.push_back(choice.choose(logits.tensor));
    return ids;
  };
  EXPECT_EQ(draw(5), draw(5));
  EXPECT_NE(draw(5), draw(6));
}

TEST(TokenChoice, RefusesWhatIsNoChoice) {
  for (const double temperature : {-0.1, double(NAN), double(INFINITY)}) {
    EXPECT_ERROR(TokenChoice(temperature, 1, 1), "temperature");
  }
  for (const double top_p : {0.0, -1.0, 1.1, double(NAN)}) {
    EXPECT_ERROR(TokenChoice(1, top_p, 1), "top-p");
  }
  TokenChoice choice(1, 1, 1);
  EXPECT_ERROR(choice.choose(Logits({0, NAN, 1}).tensor), "not finite");
  EXPECT_ERROR(choice.choose(Logits({0, INFINITY}).tensor), "not finite");
}

}  // namespace
}  // namespace entrain
