#include <gtest/gtest.h>

#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

TEST(Linear, MultipliesByTheTransposedWeight) {
  Pool pool(DType::f32);
  const Var x = pool.leaf({3, 5}), w = pool.leaf({7, 5});
  Tensor y;
  Graph graph({}, [&](Tape& tape) { y = ops::linear(tape, {x.value, {}}, w).value; });
  graph->forward();
  std::vector<double> expected;
  for (int64_t t = 0; t < 3; ++t) {
    for (int64_t o = 0; o < 7; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < 5; ++i) sum += get(x.value, t * 5 + i) * get(w.value, o * 5 + i);
      expected.push_back(sum);
    }
  }
  EXPECT_LT(relative_error(y, expected), 1e-6);
}

TEST(Linear, Gradients) {
  for (const auto& [count, in, out] : {std::array{1, 1, 1}, {1, 9, 4}, {5, 3, 17}, {33, 20, 7}}) {
    Pool pool;
    const Var x = pool.leaf({count, in}), w = pool.leaf({out, in});
    double loss = 0;
    Graph graph(training_f64,
                [&](Tape& tape) { probe(tape, pool, ops::linear(tape, x, w), loss); });
    expect_gradients(graph, loss, {x}, {w});
  }
}

}  // namespace
}  // namespace entrain
