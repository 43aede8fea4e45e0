#include <gtest/gtest.h>

#include "tests/attention/naive.h"

namespace entrain {
namespace {

using Sizes = AttentionCase::Sizes;

const Sizes sizes[] = {{1, 1, 1, 1, 8},    {2, 2, 1, 3, 16},  {1, 3, 1, 65, 20},  {2, 4, 2, 64, 32},
                       {1, 5, 1, 130, 16}, {1, 6, 1, 97, 64}, {1, 14, 2, 71, 20}, {1, 8, 1, 129, 8},
                       {1, 2, 2, 70, 128}, {1, 2, 1, 600, 8}};  // 600: several tiles of queries

TEST(FullAttention, IsTheDenseSoftmaxForwardAndBackward) {
  const Allowed all = [](auto...) { return true; };
  const Bias none = [](auto...) { return 0.0; };
  for (const DType real : {DType::f32, DType::f64}) {
    const double tolerance = real == DType::f64 ? 1e-10 : 1e-5;
    for (const Sizes& s : sizes) {
      SCOPED_TRACE(Shape({s.B, s.Hq, s.Hkv, s.N}).to_string());
      const AttentionCase a(s, real);
      a.forward({});
      a.backward({});
      const Naive expected = naive_attention(a, 64, all, none);
      EXPECT_LT(relative_error(a.o.value, expected.o), tolerance);
      EXPECT_LT(relative_error(a.v.grad, expected.dv), tolerance);
      if (s.N == 1) {  // p = 1: these are 0 up to rounding
        const std::vector<double> zeros(expected.dk.size());
        EXPECT_LT(relative_error(a.k.grad, zeros), real == DType::f64 ? 1e-8 : 1);
      } else {
        EXPECT_LT(relative_error(a.q.grad, expected.dq), tolerance);
        EXPECT_LT(relative_error(a.k.grad, expected.dk), tolerance);
      }
      EXPECT_EQ(a.read_sum(read_pairs), expected.pairs);
      EXPECT_EQ(a.read_sum(read_causal), expected.pairs);
      EXPECT_EQ(a.read_sum(read_router), 0);
      EXPECT_EQ(a.read_sum(read_queries), s.B * s.Hkv * s.N);
    }
  }
}

TEST(FullAttention, SurvivesHugeScores) {
  const AttentionCase a({1, 2, 1, 70, 16}, DType::f32);
  for (int64_t i = 0; i < a.qkv.value.numel(); ++i) put(a.qkv.value, i, 300 * get(a.qkv.value, i));
  a.forward({});
  a.backward({});
  for (const Tensor& t : {a.out.value, a.qkv.grad}) {
    for (const double x : values(t)) ASSERT_TRUE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace entrain
