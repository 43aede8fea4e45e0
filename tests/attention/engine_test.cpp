// The engine of all block-sparse methods, with masks and biases that no router would make.
#include <gtest/gtest.h>

#include "tests/attention/naive.h"

namespace entrain {
namespace {

using Sizes = AttentionCase::Sizes;

struct Blocks {
  Blocks(AttentionCase& a, int64_t block)
      : s(a.s),
        M((s.N + block - 1) / block),
        set{.block = block,
            .mask = a.pool.make({s.B, s.Hkv, s.N, (M + 63) / 64}, DType::u64),
            .bias = a.pool.make({s.B, s.Hkv, s.N, M})} {
    for (int64_t i = 0; i < set.bias.numel(); ++i) put(set.bias, i, a.pool.rng().normal());
  }

  void attend(int64_t row, int64_t c) const {
    set.mask.ptr<uint64_t>()[row * set.mask[3] + c / 64] |= uint64_t{1} << (c % 64);
  }
  bool attends(int64_t row, int64_t c) const {
    return set.mask.ptr<uint64_t>()[row * set.mask[3] + c / 64] >> (c % 64) & 1;
  }
  int64_t row(int64_t b, int64_t r, int64_t i) const { return (b * s.Hkv + r) * s.N + i; }

  Sizes s;
  int64_t M;
  BlockSet set;
};

void expect_naive(AttentionCase& a, const Blocks& blocks) {
  const Allowed allowed = [&](int64_t b, int64_t r, int64_t i, int64_t c) {
    return blocks.attends(blocks.row(b, r, i), c);
  };
  const Bias bias = [&](int64_t b, int64_t r, int64_t i, int64_t c) {
    return get(blocks.set.bias, blocks.row(b, r, i) * blocks.M + c);
  };
  const Tensor dbias = a.pool.make(blocks.set.bias.shape);
  fill(dbias, NAN);
  a.forward(blocks.set);
  a.backward(blocks.set, dbias);
  const Naive expected = naive_attention(a, blocks.set.block, allowed, bias);
  const double tolerance = a.qkv.value.dtype == DType::f64 ? 1e-10 : 1e-5;
  EXPECT_LT(relative_error(a.o.value, expected.o), tolerance);
  EXPECT_LT(relative_error(a.q.grad, expected.dq), tolerance);
  EXPECT_LT(relative_error(a.k.grad, expected.dk), tolerance);
  EXPECT_LT(relative_error(a.v.grad, expected.dv), tolerance);
  if (blocks.M > 1) {  // else a constant shift of all logits: 0 up to rounding
    EXPECT_LT(relative_error(dbias, expected.dbias), tolerance);
  }
  EXPECT_EQ(a.read_sum(read_pairs), expected.pairs);
  const int64_t width = a.s.Hq / a.s.Hkv * a.s.D;
  EXPECT_EQ(a.read_sum(read_flops), 12 * static_cast<double>(width) * expected.pairs);
}

const Sizes sizes[] = {{2, 2, 1, 37, 8}, {1, 6, 2, 130, 20}, {1, 8, 1, 97, 32}, {1, 1, 1, 530, 16}};

TEST(Engine, RandomMasksAndBiases) {
  for (const DType real : {DType::f32, DType::f64}) {
    for (const Sizes& s : sizes) {
      for (const int64_t block : {1, 5, 16, 64}) {
        SCOPED_TRACE(fmt::format("N {} block {} {}", s.N, block, name_of(real)));
        AttentionCase a(s, real);
        const Blocks blocks(a, block);
        for (int64_t row = 0; row < s.B * s.Hkv * s.N; ++row) {
          const uint64_t kind = a.pool.rng().below(5);
          for (int64_t c = 0; c < blocks.M; ++c) {  // blocks after the query's own included
            const bool some = a.pool.rng().below(3) == 0;
            if (kind == 1 || (kind > 1 && some)) blocks.attend(row, c);  // kind 0: nothing
          }
        }
        expect_naive(a, blocks);
      }
    }
  }
}

TEST(Engine, QueriesThatAttendNothingGiveZero) {
  AttentionCase a({1, 2, 1, 20, 8}, DType::f32);
  const Blocks blocks(a, 4);
  a.forward(blocks.set);
  a.backward(blocks.set);
  for (const Tensor& t : {a.out.value, a.qkv.grad}) {
    for (const double x : values(t)) EXPECT_EQ(x, 0);
  }
  EXPECT_EQ(a.read_sum(read_pairs), 0);
  EXPECT_EQ(a.read_sum(read_blocks), 0);
  EXPECT_EQ(a.read_sum(read_causal), 210);
}

TEST(Engine, AFullMaskIsFullAttention) {
  AttentionCase a({1, 4, 2, 100, 16}, DType::f64), full({1, 4, 2, 100, 16}, DType::f64);
  const Blocks blocks(a, 16);
  fill(blocks.set.bias, 0.7);  // the same on all: no effect
  for (int64_t row = 0; row < 200; ++row) {
    for (int64_t c = 0; c < blocks.M; ++c) blocks.attend(row, c);
  }
  a.forward(blocks.set);
  a.backward(blocks.set);
  full.forward({});
  full.backward({});
  EXPECT_LT(relative_error(a.out.value, values(full.out.value)), 1e-12);
  EXPECT_LT(relative_error(a.qkv.grad, values(full.qkv.grad)), 1e-12);
}

TEST(Engine, CountsAddUpOverForwardPasses) {
  AttentionCase a({2, 4, 2, 50, 8}, DType::f32);
  const Blocks blocks(a, 8);
  double attended = 0;
  for (int64_t row = 0; row < 200; ++row) {
    const int64_t own = row % 50 / 8;
    blocks.attend(row, own);
    if (own > 1) blocks.attend(row, 1);
    attended += own > 1 ? 2 : 1;
  }
  for (const double passes : {1, 2}) {
    a.forward(blocks.set);
    EXPECT_EQ(a.read_sum(read_blocks), passes * attended);
    EXPECT_EQ(a.read_sum(read_queries), passes * 200);
    EXPECT_EQ(a.read_sum(read_causal), passes * 4 * 50 * 51 / 2);
  }
}

TEST(Engine, BitsDoNotDependOnTheThreads) {
  AttentionCase one({1, 4, 2, 300, 16}, DType::f32), two({1, 4, 2, 300, 16}, DType::f32);
  std::vector<Tensor> dbiases;
  for (AttentionCase* a : {&one, &two}) {
    const Threads threads(a == &one ? 1 : 2);
    const Blocks blocks(*a, 16);
    for (int64_t row = 0; row < 600; ++row) {
      for (int64_t c = row % 3; c < blocks.M; c += 3) blocks.attend(row, c);
    }
    dbiases.push_back(a->pool.make(blocks.set.bias.shape));
    a->forward(blocks.set);
    a->backward(blocks.set, dbiases.back());
  }
  EXPECT_TRUE(same_bits(one.out.value, two.out.value));
  EXPECT_TRUE(same_bits(one.lse, two.lse));
  EXPECT_TRUE(same_bits(one.qkv.grad, two.qkv.grad));
  EXPECT_TRUE(same_bits(dbiases[0], dbiases[1]));
  EXPECT_TRUE(same_bits(one.read, two.read));
}

}  // namespace
}  // namespace entrain
