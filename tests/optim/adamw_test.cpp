#include "optim/adamw.h"

#include <gtest/gtest.h>

#include "tests/support.h"

namespace entrain {
namespace {

// One weight, as the paper writes it.
struct Scalar {
  double w, m = 0, v = 0;

  void step(double g, const OptimConfig& c, int t, double lr, double decay) {
    m = c.beta1 * m + (1 - c.beta1) * g;
    v = c.beta2 * v + (1 - c.beta2) * g * g;
    const double mhat = m / (1 - std::pow(c.beta1, t)), vhat = v / (1 - std::pow(c.beta2, t));
    w -= lr * (mhat / (std::sqrt(vhat) + c.eps) + decay * w);
  }
};

TEST(AdamW, FollowsTheScalarFormulaOverSteps) {
  for (const DType real : {DType::f32, DType::f64}) {
    for (const double clip : {0.0, 0.5, 1e9}) {
      OptimConfig c;
      c.clip = clip;
      Params params({{"matrix", {5, 7}, 0.5}, {"norm", {9}, 0.5, 1, false}}, 3, true, Device::cpu,
                    real);
      Optimizer optimizer(params, c);
      std::vector<Scalar> expected;
      for (const double w : values(params.values())) expected.push_back({w});
      Rng rng(7, 0);
      for (int step = 1; step <= 6; ++step) {
        double squares = 0;
        std::vector<double> g;
        for (int64_t i = 0; i < params.grads().numel(); ++i) {
          g.push_back(rng.normal() * (step == 3 ? 0.01 : 1));
          put(params.grads(), i, g.back());
          squares += g.back() * g.back();
        }
        const double norm = std::sqrt(squares), lr = 0.01 * step;
        const double scale = clip > 0 && norm > clip ? clip / norm : 1;
        for (size_t i = 0; i < g.size(); ++i) {
          expected[i].step(scale * g[i], c, step, lr, i < 35 ? c.weight_decay : 0);
        }
        optimizer.prepare(step, lr);
        optimizer.update();
        EXPECT_NEAR(optimizer.grad_norm(), norm, 1e-6 * norm);
        for (const double x : values(params.grads())) ASSERT_EQ(x, 0) << "gradients are cleared";
      }
      std::vector<double> w, m, v;
      for (const Scalar& s : expected) w.push_back(s.w), m.push_back(s.m), v.push_back(s.v);
      const double tolerance = real == DType::f64 ? 1e-13 : 1e-6;
      EXPECT_LT(relative_error(params.values(), w), tolerance) << clip;
      EXPECT_LT(relative_error(params.m(), m), tolerance) << clip;
      EXPECT_LT(relative_error(params.v(), v), tolerance) << clip;
    }
  }
}

// Each shard updates its part to the bit as all are updated at once, and no more than that.
TEST(AdamW, ShardsTakeTheStepsOfTheWhole) {
  const std::vector<ParamSpec> specs{{"matrix", {50, 7}, 0.5}, {"norm", {9}, 0.5, 1, false}};
  constexpr int count = 3;
  const auto steps = [&](Params& params) {
    Optimizer optimizer(params, {.clip = 0.5});
    Rng rng(7, 0);
    std::vector<double> norms;
    for (int step = 1; step <= 3; ++step) {
      for (int64_t i = 0; i < params.grads().numel(); ++i) put(params.grads(), i, rng.normal());
      optimizer.prepare(step, 0.01 * step);
      optimizer.update();
      norms.push_back(optimizer.grad_norm());
      for (const double x : values(params.grads())) EXPECT_EQ(x, 0) << "gradients are cleared";
    }
    return norms;
  };
  Params whole(specs, 3, true, Device::cpu);
  const std::vector<double> before = values(whole.values()), norms = steps(whole);
  for (int index = 0; index < count; ++index) {
    Params params(specs, 3, true, Device::cpu, DType::f32, {index, count});
    EXPECT_EQ(steps(params), norms);
    const int64_t begin = params.shard_begin(index), n = params.m().numel();
    ASSERT_GT(n, 0);
    EXPECT_TRUE(same_bits(params.m(), whole.m().slice(0, begin, n)));
    EXPECT_TRUE(same_bits(params.v(), whole.v().slice(0, begin, n)));
    const std::vector<double> now = values(params.values()), all = values(whole.values());
    for (int64_t i = 0; i < whole.values().numel(); ++i) {
      const auto at = static_cast<size_t>(i);
      ASSERT_EQ(now[at], i >= begin && i < begin + n ? all[at] : before[at]) << i;
    }
  }
}

TEST(AdamW, DecayShrinksOnlyWhatIsFlagged) {
  Params params({{"matrix", {4, 4}, 0.5}, {"norm", {4}, 0, 1, false}}, 3, true, Device::cpu);
  const std::vector<double> before = values(params.get("matrix").value);
  OptimConfig c;
  Optimizer optimizer(params, c);
  optimizer.prepare(1, 0.1);
  optimizer.update();  // no gradient: only decay moves
  std::vector<double> shrunk;
  for (const double w : before) shrunk.push_back(w * (1 - 0.1 * c.weight_decay));
  EXPECT_LT(relative_error(params.get("matrix").value, shrunk), 1e-6);
  EXPECT_EQ(values(params.get("norm").value), std::vector<double>(4, 1.0));
}

TEST(AdamW, AGradientThatIsNotFiniteChangesNothing) {
  Params params({{"matrix", {4, 4}, 0.5}}, 3, true, Device::cpu);
  const std::vector<double> before = values(params.values());
  fill(params.grads(), 1);
  put(params.grads(), 7, NAN);
  Optimizer optimizer(params, {});
  optimizer.prepare(1, 0.1);
  optimizer.update();
  EXPECT_TRUE(std::isnan(optimizer.grad_norm()));
  EXPECT_EQ(values(params.values()), before);
  EXPECT_EQ(values(params.m()), std::vector<double>(16, 0.0));
  EXPECT_EQ(get(params.grads(), 0), 1);
}

TEST(GradNorm, BitsDoNotDependOnTheThreads) {
  double norms[2];
  for (const int threads : {1, 2}) {
    Params params({{"matrix", {300, 301}, 1}}, 1, true, Device::cpu);
    copy(params.values(), params.grads());
    const Threads scope(threads);
    Optimizer optimizer(params, {});
    optimizer.prepare(1, 0);
    optimizer.update();
    norms[threads - 1] = optimizer.grad_norm();
  }
  EXPECT_EQ(norms[0], norms[1]);
  EXPECT_NEAR(norms[0], std::sqrt(300 * 301), 2);
}

}  // namespace
}  // namespace entrain
