#include <gtest/gtest.h>

#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

TEST(SwiGlu, IsSiluOfTheGateTimesUp) {
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    constexpr int64_t f = 11;
    const Tensor x = pool.random({2, 2 * f}, 4);
    put(x, 0, 200);  // exponentials that over- and underflow
    put(x, 1, -200);
    Tensor y;
    Graph graph({.dtype = real}, [&](Tape& tape) { y = ops::swiglu(tape, {x, {}}).value; });
    graph->forward();
    std::vector<double> expected;
    for (int64_t t = 0; t < 2; ++t) {
      for (int64_t j = 0; j < f; ++j) {
        const double gate = get(x, t * 2 * f + j), up = get(x, t * 2 * f + f + j);
        expected.push_back(gate / (1 + std::exp(-gate)) * up);
      }
    }
    EXPECT_LT(relative_error(y, expected), real == DType::f64 ? 1e-14 : 1e-6);
  }
}

TEST(SwiGlu, Gradients) {
  for (const auto& [count, f] : {std::array{1, 1}, {1, 5}, {3, 16}, {7, 19}}) {
    Pool pool;
    const Var x = pool.leaf({count, 2 * f}, 2);
    double loss = 0;
    Graph graph(training_f64, [&](Tape& tape) { probe(tape, pool, ops::swiglu(tape, x), loss); });
    expect_gradients(graph, loss, {x}, {});
  }
}

}  // namespace
}  // namespace entrain
