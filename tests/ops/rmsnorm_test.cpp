#include <gtest/gtest.h>

#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

constexpr double eps = 1e-5;

TEST(RmsNorm, RowsHaveUnitMeanSquareTimesTheWeight) {
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    const Var x = pool.leaf({3, 37}, 5), w = pool.leaf({37});
    Tensor y;
    Graph graph({.dtype = real}, [&](Tape& tape) {
      y = ops::rmsnorm(tape, {x.value, {}}, w, eps).value;
    });
    graph->forward();
    std::vector<double> expected;
    for (int64_t t = 0; t < 3; ++t) {
      double squares = 0;
      for (int64_t j = 0; j < 37; ++j) squares += std::pow(get(x.value, t * 37 + j), 2);
      for (int64_t j = 0; j < 37; ++j) {
        expected.push_back(get(x.value, t * 37 + j) / std::sqrt(squares / 37 + eps) *
                           get(w.value, j));
      }
    }
    EXPECT_LT(relative_error(y, expected), real == DType::f64 ? 1e-14 : 1e-6);
  }
}

TEST(RmsNorm, Gradients) {
  for (const auto& [count, d] : {std::array{1, 1}, {1, 8}, {5, 70}, {3, 129}}) {
    for (const double size : {1.0, 1e-2}) {  // 1e-2: eps matters
      Pool pool;
      const Var x = pool.leaf({count, d}), w = pool.leaf({d});
      for (int64_t i = 0; i < x.value.numel(); ++i) put(x.value, i, size * (get(x.value, i) + 2));
      double loss = 0;
      Graph graph(training_f64,
                  [&](Tape& tape) { probe(tape, pool, ops::rmsnorm(tape, x, w, 1e-3), loss); });
      expect_gradients(graph, loss, {x}, {w});
    }
  }
}

TEST(RmsNorm, AddsToTheGradientOfItsInput) {
  Pool pool;
  const Var x = pool.leaf({2, 6}), w = pool.leaf({6});
  double loss = 0;
  Graph graph(training_f64,
              [&](Tape& tape) { probe(tape, pool, ops::rmsnorm(tape, x, w, eps), loss); });
  graph->forward();
  graph->backward();
  std::vector<double> expected = values(x.grad);
  fill(x.grad, 3);
  graph->backward();
  for (double& g : expected) g += 3;
  EXPECT_LT(relative_error(x.grad, expected), 1e-14);
}

TEST(RmsNorm, AZeroRowStaysFinite) {
  Pool pool(DType::f32);
  const Var x{pool.make({1, 4}), pool.make({1, 4})}, w = pool.leaf({4});
  double loss = 0;
  Graph graph({.training = true},
              [&](Tape& tape) { probe(tape, pool, ops::rmsnorm(tape, x, w, eps), loss); });
  EXPECT_EQ(graph->first_non_finite(), "");
  EXPECT_EQ(loss, 0);
}

}  // namespace
}  // namespace entrain
