#include <gtest/gtest.h>

#include "kernels/kernels.h"
#include "ops/ops.h"
#include "tests/support.h"

namespace entrain {
namespace {

// Cross-entropy of all logits at once.
std::vector<double> cross_entropy(const Tensor& x, const Tensor& w, const Tensor& targets) {
  std::vector<double> loss;
  for (int64_t t = 0; t < x[0]; ++t) {
    std::vector<double> logits;
    for (int64_t j = 0; j < w[0]; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < x[1]; ++i) sum += get(x, t * x[1] + i) * get(w, j * x[1] + i);
      logits.push_back(sum);
    }
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double z : logits) sum += std::exp(z - top);
    loss.push_back(top + std::log(sum) - logits[static_cast<size_t>(targets.ptr<int32_t>()[t])]);
  }
  return loss;
}

struct Head {
  Head(Pool& pool, int64_t count, int64_t d, int64_t V)
      : x(pool.leaf({count, d})),
        w(pool.leaf({V, d})),
        targets(pool.integers({count}, static_cast<uint64_t>(V))) {}

  Var x, w;
  Tensor targets;
};

TEST(HeadLoss, Gradients) {
  for (const auto& [count, d, V] : {std::array{1, 1, 2}, {1, 5, 9}, {7, 4, 33}}) {
    Pool pool;
    const Head head(pool, count, d, V);
    constexpr double scale = 0.3;
    double loss = 0;
    Tensor losses;
    const int64_t size = count;
    Graph graph(training_f64, [&](Tape& tape) {
      losses = tape.keep({size});
      ops::head_loss(tape, head.x, head.w, head.targets, scale, losses);
      tape.record("sum", {}, {}, [=, &loss] {
        loss = 0;
        for (int64_t i = 0; i < losses.numel(); ++i) loss += scale * get(losses, i);
      });
    });
    expect_gradients(graph, loss, {head.x}, {head.w});
    EXPECT_LT(relative_error(losses, cross_entropy(head.x.value, head.w.value, head.targets)),
              1e-12);
  }
}

TEST(HeadLoss, StripsGiveWhatOnePieceGives) {
  constexpr int64_t count = 23, d = 6, V = 31;
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    const Head head(pool, count, d, V);
    const Kernels<Device::cpu> k;
    const Tensor loss = pool.make({count});
    std::vector<std::vector<double>> whole;
    const double tolerance = real == DType::f64 ? 1e-13 : 1e-5;
    for (const int64_t strip : {count, int64_t{1}, int64_t{4}, int64_t{22}}) {
      fill(head.w.grad, 0);
      k.head_loss(head.x.value, head.w.value, head.targets, 0.5, loss, {}, head.x.grad, head.w.grad,
                  pool.make({strip, V}));
      if (whole.empty()) whole = {values(loss), values(head.x.grad), values(head.w.grad)};
      EXPECT_LT(relative_error(loss, whole[0]), tolerance) << strip;
      EXPECT_LT(relative_error(head.x.grad, whole[1]), tolerance) << strip;
      EXPECT_LT(relative_error(head.w.grad, whole[2]), tolerance) << strip;
    }
    EXPECT_LT(relative_error(loss, cross_entropy(head.x.value, head.w.value, head.targets)),
              tolerance);
  }
}

TEST(HeadLoss, TheOpHoldsOneStripOfALargeVocabulary) {
  constexpr int64_t count = 70, d = 3, V = 20000;
  Pool pool;
  const Head head(pool, count, d, V);
  Tensor loss;
  Graph graph(training_f64, [&](Tape& tape) {
    loss = tape.keep({count});
    ops::head_loss(tape, head.x, head.w, head.targets, 0.5, loss);
  });
  EXPECT_LT(graph.memory().scratch.peak(), count * V * sizeof(double));
  graph->forward();
  const Tensor whole = pool.make({count}), dx = pool.make({count, d}), dw = pool.make({V, d});
  Kernels<Device::cpu>{}.head_loss(head.x.value, head.w.value, head.targets, 0.5, whole, {}, dx, dw,
                                   pool.make({count, V}));
  EXPECT_LT(relative_error(loss, values(whole)), 1e-13);
  EXPECT_LT(relative_error(head.x.grad, values(dx)), 1e-13);
  EXPECT_LT(relative_error(head.w.grad, values(dw)), 1e-13);
}

TEST(HeadLoss, PredictsTheLargestLogitTheLowestOfEqualOnes) {
  constexpr int64_t count = 90, d = 3, V = 20000;  // two strips
  for (const DType real : {DType::f32, DType::f64}) {
    Pool pool(real);
    const Head head(pool, count, d, V);
    // Small integers: logits are exact, and many of them equal.
    for (const Tensor& t : {head.x.value, head.w.value})
      for (int64_t i = 0; i < t.numel(); ++i) put(t, i, std::round(get(t, i)));
    const Tensor predicted = pool.integers({count}, 7);
    Graph graph({.dtype = real}, [&](Tape& tape) {
      ops::head_loss(tape, {head.x.value, {}}, {head.w.value, {}}, head.targets, 1,
                     tape.keep({count}), predicted);
    });
    graph->forward();
    for (int64_t t = 0; t < count; ++t) {
      int32_t best = 0;
      double top = -1e9;
      for (int32_t j = 0; j < V; ++j) {
        double logit = 0;
        for (int64_t i = 0; i < d; ++i)
          logit += get(head.x.value, t * d + i) * get(head.w.value, j * d + i);
        if (logit > top) top = logit, best = j;
      }
      EXPECT_EQ(predicted.ptr<int32_t>()[t], best) << t;
    }
  }
}

TEST(HeadLoss, SurvivesHugeLogitsAndNeedsNoGradients) {
  Pool pool(DType::f32);
  const Head head(pool, 5, 8, 40);
  for (int64_t i = 0; i < head.x.value.numel(); ++i)
    put(head.x.value, i, 1e4 * get(head.x.value, i));
  Tensor loss;
  Graph graph({}, [&](Tape& tape) {
    loss = tape.keep({5});
    ops::head_loss(tape, {head.x.value, {}}, {head.w.value, {}}, head.targets, 1, loss);
  });
  graph->forward();
  EXPECT_LT(relative_error(loss, cross_entropy(head.x.value, head.w.value, head.targets)), 1e-5);
}

}  // namespace
}  // namespace entrain
