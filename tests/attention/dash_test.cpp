#include <gtest/gtest.h>

#include <bit>

#include "attention/attention.h"
#include "tests/attention/naive.h"
#include "tests/expect_error.h"

namespace entrain {
namespace {

using Sizes = AttentionCase::Sizes;

AttentionConfig config(int chunk) {
  return {.method = "dash", .chunk = chunk, .alpha = 1.5, .gamma = 2, .sigma = 1};
}

/// One DashAttention on a tape, its loss <o, dout>, and its routing recomputed beside it.
class Dash {
 public:
  Dash(Sizes s, const AttentionConfig& c, DType real = DType::f64, uint64_t seed = 1)
      : a(s, real, seed),
        summary(a.pool.leaf({s.Hkv * s.D}, 0.5)),
        entropy(a.pool.make({s.N, entropy_fields}, DType::f64)),
        method(make_attention(c)),
        graph({.dtype = real, .training = true},
              [&](Tape& tape) {
                method->record(tape, {a.q, a.k, a.v, {}, {summary}, a.read, entropy}, a.o);
              }),
        config_(c) {}

  double loss() {
    graph->forward();
    const std::vector<double> o = values(a.out.value), dout = values(a.out.grad);
    double sum = 0;
    for (size_t i = 0; i < o.size(); ++i) sum += o[i] * dout[i];
    return sum;
  }
  void backward() {
    fill(summary.grad, 0);
    graph->forward();
    graph->backward();
  }

  /// Heads that choose for themselves.
  int64_t routers() const { return config_.aggregation == "softmax" ? a.s.Hkv : a.s.Hq; }
  int64_t chunks() const { return (a.s.N + config_.chunk - 1) / config_.chunk; }

  /// The blocks that the queries of `heads` key-value heads attend; with as many as there are query
  /// heads, the support of every head's own entmax.
  BlockSet route(int64_t heads) {
    const auto [B, Hq, Hkv, N, D] = a.s;
    const int64_t M = chunks();
    const double alpha_gamma[] = {*method->alpha(), *method->gamma()};
    const DashRouting routing{.chunk = config_.chunk,
                              .sigma = config_.sigma,
                              .prior_eps = config_.prior_eps,
                              .center = config_.center,
                              .init_blocks = config_.init_blocks,
                              .local_blocks = config_.local_blocks,
                              .aggregation = config_.aggregation == "softmax" ? Aggregation::softmax
                                                                              : Aggregation::entmax,
                              .alpha_gamma = alpha_gamma};
    const BlockSet blocks{.block = config_.chunk,
                          .mask = a.pool.make({B, heads, N, (M + 63) / 64}, DType::u64),
                          .bias = a.pool.make({B, heads, N, M})};
    const Tensor kbar = a.pool.make({B, Hkv, M, D}, DType::f64);
    const Tensor per_head = a.pool.make({B, heads, M, D}, DType::f64);
    a.kernels.dash_summaries(a.k.value, config_.summaries == "mean" ? Tensor{} : summary.value,
                             routing.chunk, kbar);
    for (int64_t h = 0; h < B * heads; ++h) {
      std::copy_n(kbar.ptr<double>() + h * Hkv / heads * M * D, M * D,
                  per_head.ptr<double>() + h * M * D);
    }
    a.kernels.dash_route(a.q.value, per_head, routing, a.pool.make({B, Hq, N}, DType::f64), blocks,
                         {}, {}, {});
    return blocks;
  }

  AttentionCase a;
  const Var summary;  // flat, as the method stores it
  const Tensor entropy;
  std::unique_ptr<AttentionMethod> method;
  Graph graph;

 private:
  AttentionConfig config_;
};

/// The whole backward against differences, at entries where no head's support changes.
void expect_slopes(Dash& dash) {
  const Threads one(1);
  dash.backward();
  const Tensor before = dash.route(dash.routers()).mask;
  struct Leaf {
    Tensor x;
    std::vector<double> gradient;
    int64_t samples;
  };
  const Leaf leaves[] = {{dash.a.qkv.value, values(dash.a.qkv.grad), 250},
                         {dash.summary.value, values(dash.summary.grad), 16}};
  for (const Leaf& leaf : leaves) {
    std::vector<double> actual, expected;
    int64_t visited = 0;
    const int64_t step = std::max<int64_t>(1, leaf.x.numel() / leaf.samples) | 1;
    for (int64_t i = 0; i < leaf.x.numel(); i += step, ++visited) {
      constexpr double h = 1e-5;
      bool stable = true;
      for (const double offset : {-2 * h, 2 * h}) {
        double& entry = leaf.x.ptr<double>()[i];
        const double here = entry;
        entry = here + offset;
        stable = stable && same_bits(dash.route(dash.routers()).mask, before);
        entry = here;
      }
      if (!stable) continue;
      actual.push_back(leaf.gradient[static_cast<size_t>(i)]);
      expected.push_back(slope(
          leaf.x, i, [&] { return dash.loss(); }, h));
    }
    EXPECT_GE(actual.size(), 0.9 * static_cast<double>(visited));
    EXPECT_LT(relative_error(actual, expected), 1e-6) << leaf.x.shape.to_string();
  }
}

TEST(DashAttention, TheWholeBackwardIsTheSlope) {
  for (const double alpha : {1.0, 1.25, 1.5, 1.75, 2.0}) {
    for (const double sigma : {1.0, 30.0}) {
      AttentionConfig c = config(4);
      c.alpha = alpha;
      c.sigma = sigma;
      Dash dash({1, 4, 2, 22, 6}, c);
      SCOPED_TRACE(fmt::format("alpha {} sigma {}", alpha, sigma));
      expect_slopes(dash);
    }
  }
}

TEST(DashAttention, TheWholeBackwardWithEveryOption) {
  struct Option {
    double eps;
    bool center;
    int init, local;
  };
  for (const Option& o : {Option{0, false, 0, 1},
                          {1e-2, true, 0, 1},
                          {1e-2, false, 1, 2},
                          {0, true, 2, 1},
                          {0, true, 0, 0},
                          {0, true, 1, 3}}) {
    AttentionConfig c = config(3);
    c.prior_eps = o.eps;
    c.center = o.center;
    c.init_blocks = o.init;
    c.local_blocks = o.local;
    SCOPED_TRACE(
        fmt::format("eps {} center {} init {} local {}", o.eps, o.center, o.init, o.local));
    Dash grouped({1, 3, 1, 23, 5}, c), batched({2, 2, 2, 19, 4}, c);  // 19, 23: a partial chunk
    expect_slopes(grouped);
    expect_slopes(batched);
  }
}

TEST(DashAttention, TheWholeBackwardOfItsAblations) {
  for (const double alpha : {1.25, 1.5, 2.0}) {
    AttentionConfig c = config(3);
    c.alpha = alpha;
    c.aggregation = "softmax";
    c.gamma = 20;
    SCOPED_TRACE(alpha);
    Dash grouped({1, 3, 1, 23, 5}, c), batched({2, 2, 2, 19, 4}, c);
    expect_slopes(grouped);
    expect_slopes(batched);
  }
  AttentionConfig c = config(3);
  c.summaries = "mean";
  Dash mean({1, 4, 2, 23, 5}, c);
  expect_slopes(mean);
  for (const double x : values(mean.summary.grad)) EXPECT_EQ(x, 0);
}

// With summary queries of 0, learned summaries are means.
TEST(DashAttention, MeansAreWhereSummariesStart) {
  AttentionConfig c = config(4);
  Dash learned({1, 4, 2, 40, 8}, c);
  fill(learned.summary.value, 0);
  c.summaries = "mean";
  Dash mean({1, 4, 2, 40, 8}, c);
  learned.backward();
  mean.backward();
  EXPECT_LT(relative_error(mean.a.out.value, values(learned.a.out.value)), 1e-14);
  EXPECT_LT(relative_error(mean.a.qkv.grad, values(learned.a.qkv.grad)), 1e-13);
}

// Softmax before the mean: w = entmax(gamma mean_h softmax(z^h)) by its definition.
TEST(DashAttention, AggregatesSoftmaxBeforeEntmax) {
  AttentionConfig c = config(4);
  c.aggregation = "softmax";
  c.gamma = 30;
  Dash dash({1, 2, 1, 40, 8}, c);
  const BlockSet blocks = dash.route(1);
  const int64_t M = dash.chunks();
  const Tensor kbar = dash.a.pool.make({1, 1, M, 8}, DType::f64);
  dash.a.kernels.dash_summaries(dash.a.k.value, dash.summary.value, 4, kbar);
  const std::vector<double> q = values(dash.a.q.value);
  for (int64_t i = 8; i < 40; ++i) {
    const int64_t n = i / 4;
    const Tensor mixed = dash.a.pool.make({1, n}), length = dash.a.pool.make({1}, DType::i32);
    length.ptr<int32_t>()[0] = static_cast<int32_t>(n);
    for (int64_t h = 0; h < 2; ++h) {
      std::vector<double> z(static_cast<size_t>(n));
      double sum = 0;
      for (int64_t m = 0; m < n; ++m) {
        double dot = 0;
        for (int64_t d = 0; d < 8; ++d) {
          dot += q[static_cast<size_t>((h * 40 + i) * 8 + d)] * get(kbar, m * 8 + d);
        }
        sum += z[static_cast<size_t>(m)] = std::exp(dot / std::sqrt(8.0));
      }
      for (int64_t m = 0; m < n; ++m) {
        put(mixed, m, get(mixed, m) + c.gamma / 2 * z[static_cast<size_t>(m)] / sum);
      }
    }
    const Tensor w = dash.a.pool.make({1, n});
    dash.a.kernels.entmax(mixed, length, c.alpha, w);
    for (int64_t m = 0; m < n; ++m) {
      EXPECT_EQ(blocks.mask.ptr<uint64_t>()[i] >> m & 1, get(w, m) > 0) << i << ", " << m;
    }
  }
}

TEST(DashAttention, WithoutItsGradientTheRouterIsFixed) {
  AttentionConfig c = config(4);
  Dash whole({1, 4, 2, 40, 8}, c);
  c.router_gradient = false;
  Dash cut({1, 4, 2, 40, 8}, c);
  whole.backward();
  cut.backward();
  EXPECT_TRUE(same_bits(cut.a.out.value, whole.a.out.value));
  for (const double x : values(cut.summary.grad)) EXPECT_EQ(x, 0);
  EXPECT_GT(relative_error(cut.a.q.grad, values(whole.a.q.grad)), 1e-3);
  // What is left is attention's own gradient under the same blocks and bias.
  const BlockSet blocks = cut.route(2);
  AttentionCase alone({1, 4, 2, 40, 8}, DType::f64);
  alone.forward(blocks);
  alone.backward(blocks);
  EXPECT_LT(relative_error(cut.a.qkv.grad, values(alone.qkv.grad)), 1e-12);
}

TEST(DashAttention, MeasuresHowRoutingSpreads) {
  AttentionConfig c = config(4);
  for (const double alpha : {1.0, 1.5}) {
    c.alpha = alpha;
    Dash dash({2, 4, 2, 40, 8}, c);
    dash.loss();
    double candidates = 0, routing = 0, softmax = 0;
    for (int64_t i = 0; i < 40; ++i) {
      const double* fields = dash.entropy.ptr<double>() + i * entropy_fields;
      EXPECT_EQ(fields[entropy_queries], i < 4 ? 0 : 4) << "kv heads and batch";
      candidates += fields[entropy_candidates];
      EXPECT_LE(fields[entropy_softmax], 4 * std::log(std::max<int64_t>(1, i / 4)) + 1e-12);
      routing += fields[entropy_routing];
      softmax += fields[entropy_softmax];
    }
    EXPECT_EQ(candidates, dash.a.read_sum(read_router));
    EXPECT_GT(routing, 1);
    if (alpha == 1) {
      EXPECT_NEAR(routing, softmax, 1e-9);
    } else {
      EXPECT_LT(routing, 0.9 * softmax);
    }
    // By definition, from the weights that routing hands out.
    const BlockSet blocks = dash.route(2);
    const Tensor w = dash.a.pool.make(blocks.bias.shape);
    const double alpha_gamma[] = {*dash.method->alpha(), *dash.method->gamma()};
    const Tensor kbar = dash.a.pool.make({2, 2, 10, 8}, DType::f64);
    dash.a.kernels.dash_summaries(dash.a.k.value, dash.summary.value, 4, kbar);
    dash.a.kernels.dash_route(dash.a.q.value, kbar, {.chunk = 4, .alpha_gamma = alpha_gamma},
                              dash.a.pool.make({2, 4, 40}), blocks, w, {}, {});
    double expected = 0;
    for (const double x : values(w)) expected -= x > 0 ? x * std::log(x) : 0;
    EXPECT_NEAR(routing, expected, 1e-9);
  }
}

TEST(DashAttention, TheRouterLearnsFromTheTokens) {
  Dash dash({1, 4, 2, 40, 8}, config(4));
  dash.backward();
  double norm = 0;
  for (const double x : values(dash.summary.grad)) norm += x * x;
  EXPECT_GT(norm, 1e-6);
  const std::vector<double> once = values(dash.summary.grad);
  dash.graph->backward();  // summaries are parameters: added to
  std::vector<double> twice;
  for (const double x : once) twice.push_back(2 * x);
  EXPECT_LT(relative_error(dash.summary.grad, twice), 1e-14);
}

TEST(DashAttention, WithoutCandidatesItIsCausalAttentionWithinReach) {
  const auto none = [](auto...) { return 0.0; };
  struct Setting {
    int chunk, init, local;
  };
  for (const Setting& t : {Setting{64, 0, 1}, {32, 0, 1}, {8, 0, 9}, {8, 9, 1}, {8, 4, 3}}) {
    AttentionConfig c = config(t.chunk);
    c.init_blocks = t.init;
    c.local_blocks = t.local;
    Dash dash({1, 2, 1, t.chunk == 32 ? 32 : 50, 8}, c);
    dash.backward();
    const Naive expected = naive_attention(
        dash.a, 64, [](auto...) { return true; }, none);
    EXPECT_LT(relative_error(dash.a.o.value, expected.o), 1e-12);
    EXPECT_LT(relative_error(dash.a.q.grad, expected.dq), 1e-12);
    EXPECT_LT(relative_error(dash.a.k.grad, expected.dk), 1e-12);
    EXPECT_LT(relative_error(dash.a.v.grad, expected.dv), 1e-12);
    for (const double x : values(dash.summary.grad)) EXPECT_EQ(x, 0);
    EXPECT_EQ(dash.a.read_sum(read_router), 0);
  }
}

TEST(DashAttention, LargerGammaIsSparserDownToAChunkAHead) {
  AttentionConfig c = config(4);
  double before = INFINITY;
  for (const double gamma : {0.01, 1.0, 4.0, 1e4}) {
    c.gamma = gamma;
    Dash dash({1, 3, 1, 80, 8}, c);
    dash.loss();
    const double blocks = dash.a.read_sum(read_blocks) / 80;
    EXPECT_LE(blocks, before);
    before = blocks;
  }
  EXPECT_LE(before, 1 + 3);
  EXPECT_GT(before, 1);
}

TEST(DashAttention, HugeScoresRouteToOneChunkAHead) {
  AttentionConfig c = config(4);
  c.gamma = 1e12;  // where a double still tells 1 from 0: thresholds are within 1 of scores
  Dash dash({1, 2, 2, 40, 8}, c);
  dash.backward();
  EXPECT_EQ(dash.a.read_sum(read_blocks), 2 * (40 + 36));  // the own and, past the first, a routed
  for (const double x : values(dash.a.qkv.grad)) ASSERT_TRUE(std::isfinite(x));
}

TEST(DashAttention, CountsWhatItReads) {
  AttentionConfig c = config(5);
  c.init_blocks = 1;
  c.local_blocks = 2;
  Dash dash({2, 4, 2, 48, 8}, c);
  dash.loss();
  const BlockSet blocks = dash.route(2);
  double pairs = 0, attended = 0, candidates = 0;
  for (int64_t row = 0; row < 2 * 2 * 48; ++row) {
    const int64_t i = row % 48, own = i / 5;
    candidates += static_cast<double>(std::max<int64_t>(0, own - 2));  // less 1 first, 2 last
    const uint64_t mask = blocks.mask.ptr<uint64_t>()[row];
    attended += std::popcount(mask);
    for (int64_t j = 0; j <= i; ++j) pairs += mask >> (j / 5) & 1;
    EXPECT_EQ(mask >> (own + 1), 0) << "a later chunk";
    EXPECT_TRUE(mask & 1) << "the first chunk is forced";
    EXPECT_TRUE(mask >> own & 1) << "the own chunk is forced";
    EXPECT_TRUE(own == 0 || mask >> (own - 1) & 1) << "the chunk before is forced";
  }
  EXPECT_EQ(dash.a.read_sum(read_pairs), pairs);
  EXPECT_EQ(dash.a.read_sum(read_blocks), attended);
  EXPECT_EQ(dash.a.read_sum(read_router), candidates);
  EXPECT_EQ(dash.a.read_sum(read_causal), 4 * 48 * 49 / 2);
  EXPECT_EQ(dash.a.read_sum(read_queries), 4 * 48);
  EXPECT_EQ(dash.a.read_sum(read_flops), (12 * pairs + 6 * candidates) * 2 * 8);
}

// 70 chunks: masks of two words.
TEST(DashAttention, RoutesOverMoreChunksThanAWordHolds) {
  Dash dash({1, 2, 1, 140, 4}, config(2));
  dash.backward();
  const BlockSet blocks = dash.route(1);
  ASSERT_EQ(blocks.mask[3], 2);
  bool second = false;
  for (int64_t i = 0; i < 140; ++i) second = second || blocks.mask.ptr<uint64_t>()[2 * i + 1] != 0;
  EXPECT_TRUE(second);
  const Allowed allowed = [&](int64_t, int64_t, int64_t i, int64_t c) {
    return blocks.mask.ptr<uint64_t>()[2 * i + c / 64] >> (c % 64) & 1;
  };
  const Bias bias = [&](int64_t, int64_t, int64_t i, int64_t c) {
    return get(blocks.bias, i * dash.chunks() + c);
  };
  const Naive expected = naive_attention(dash.a, 2, allowed, bias);
  EXPECT_LT(relative_error(dash.a.o.value, expected.o), 1e-12);
  EXPECT_LT(relative_error(dash.a.v.grad, expected.dv), 1e-12);
}

TEST(DashAttention, BitsDoNotDependOnTheThreads) {
  Dash one({1, 4, 2, 300, 16}, config(16), DType::f32);
  Dash two({1, 4, 2, 300, 16}, config(16), DType::f32);
  for (Dash* dash : {&one, &two}) {
    const Threads threads(dash == &one ? 1 : 2);
    dash->backward();
  }
  EXPECT_TRUE(same_bits(one.a.out.value, two.a.out.value));
  EXPECT_TRUE(same_bits(one.a.qkv.grad, two.a.qkv.grad));
  EXPECT_TRUE(same_bits(one.summary.grad, two.summary.grad));
  EXPECT_TRUE(same_bits(one.a.read, two.a.read));
}

TEST(AttentionRegistry, NamesTheKnownMethods) {
  EXPECT_ERROR(make_attention({.method = "fool"}), "unknown attention.method fool; known are full");
}

}  // namespace
}  // namespace entrain
