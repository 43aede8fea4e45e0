#include <gtest/gtest.h>

#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

TEST(Embedding, PicksRowsAndAddsTheirGradients) {
  for (const int64_t count : {1, 7}) {
    for (const int64_t d : {1, 5, 130}) {
      Pool pool;
      const Var w = pool.leaf({4, d});
      const Tensor tokens = pool.integers({count}, 4);  // 7 tokens of 4: some occur twice
      double loss = 0;
      Tensor y;
      Graph graph(training_f64, [&](Tape& tape) {
        const Var out = ops::embedding(tape, tokens, w);
        y = out.value;
        probe(tape, pool, out, loss);
      });
      expect_gradients(graph, loss, {}, {w});
      for (int64_t t = 0; t < count; ++t) {
        const int32_t row = tokens.ptr<int32_t>()[t];
        EXPECT_EQ(values(y.slice(0, t, 1)), values(w.value.slice(0, row, 1)));
      }
    }
  }
}

}  // namespace
}  // namespace entrain
