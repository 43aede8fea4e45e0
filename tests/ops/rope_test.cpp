#include <gtest/gtest.h>

#include "kernels/kernels.h"
#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

// [B, N, H D] as heads [B, H, N, D], as the decoder views a projection.
Tensor heads(const Tensor& x, Shape packed, int64_t D) {
  return x.view(packed).split(2, D).transpose(1, 2);
}

TEST(Rope, TurnsTheHalvesOfAHeadByPositionTimesFrequency) {
  constexpr int64_t B = 2, H = 3, N = 5, D = 6;
  constexpr double theta = 100;
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    const Tensor x = pool.random({B, N, H * D}), table = pool.make({N, D});
    const Tensor view = heads(x, x.shape, D);
    const std::vector<double> before = values(view);
    ops::rope_table(table, theta);
    const Kernels<Device::cpu> k;
    k.rope(view, table, false);
    std::vector<double> expected = before;
    for (size_t head = 0; head < B * H; ++head) {
      for (size_t i = 0; i < N; ++i) {
        for (size_t j = 0; j < D / 2; ++j) {
          const double angle =
              static_cast<double>(i) * std::pow(theta, -2 * static_cast<double>(j) / D);
          const size_t low = (head * N + i) * D + j, high = low + D / 2;
          expected[low] = before[low] * std::cos(angle) - before[high] * std::sin(angle);
          expected[high] = before[high] * std::cos(angle) + before[low] * std::sin(angle);
        }
      }
    }
    const double tolerance = real == DType::f64 ? 1e-14 : 1e-6;
    EXPECT_LT(relative_error(view, expected), tolerance);
    k.rope(view, table, true);
    EXPECT_LT(relative_error(view, before), tolerance);
  }
}

TEST(Rope, Gradients) {
  for (const auto& [B, H, N, D] : {std::array{1, 1, 1, 2}, {2, 3, 5, 6}, {1, 2, 9, 10}}) {
    Pool pool;
    const Var x = pool.leaf({B * N, 3}), w = pool.leaf({H * D, 3});
    const Tensor table = pool.make({N, D});
    ops::rope_table(table, 10000);
    double loss = 0;
    Graph graph(training_f64, [&](Tape& tape) {
      const Var y = ops::linear(tape, x, w);  // rope works in place: not on a leaf
      const Shape packed{B, N, H * D};
      ops::rope(tape, {heads(y.value, packed, D), heads(y.grad, packed, D)}, table);
      probe(tape, pool, y, loss);
    });
    expect_gradients(graph, loss, {x}, {w});
  }
}

}  // namespace
}  // namespace entrain
