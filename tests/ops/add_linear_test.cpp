#include <gtest/gtest.h>

#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

// Two branches of one stream, as in a decoder layer: the stream's gradient collects all paths.
TEST(AddLinear, GradientsOfAStreamWithTwoBranches) {
  for (const auto& [count, d] : {std::array{1, 3}, {6, 17}}) {
    Pool pool;
    const Tensor tokens = pool.integers({count}, 5);
    const Var table = pool.leaf({5, d}), norm = pool.leaf({d});
    const Var first = pool.leaf({d, d}), second = pool.leaf({d, d});
    double loss = 0;
    Tensor start, end;
    Graph graph(training_f64, [&](Tape& tape) {
      Var x = ops::embedding(tape, tokens, table);
      start = x.grad;
      for (const Var& w : {first, second}) {
        x = ops::add_linear(tape, x, ops::rmsnorm(tape, x, norm, 1e-5), w);
      }
      end = x.grad;
      probe(tape, pool, x, loss);
    });
    EXPECT_EQ(start.data, end.data);
    expect_gradients(graph, loss, {}, {table, norm, first, second});
  }
}

}  // namespace
}  // namespace entrain
