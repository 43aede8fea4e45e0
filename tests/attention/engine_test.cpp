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

/// Queries [first, first + count) of a case against the keys up to the last of them.
void forward_piece(const AttentionCase& a, BlockSet set, int64_t first, int64_t count, Tensor keys,
                   Tensor lse) {
  set.first = first;
  const int64_t seen = set.keys.within(first + count);
  a.kernels.attention(a.q.value.slice(2, first, count), a.k.value.slice(2, 0, seen),
                      a.v.value.slice(2, 0, seen), set, a.o.value.slice(2, first, count), lse, keys,
                      a.read);
}

TEST(Engine, QueriesInPiecesAreTheWholeSequence) {
  const Sizes s{1, 6, 2, 130, 20};
  for (const int64_t block : {1, 7, 64, 200}) {
    for (const int64_t window : {0, 20}) {
      for (const int64_t size : {1, 9, 100}) {
        for (const bool prepared : {false, true}) {
          SCOPED_TRACE(fmt::format("block {} window {} pieces {}", block, window, size));
          AttentionCase whole(s, DType::f64), pieces(s, DType::f64);
          const Blocks blocks(whole, block);
          for (int64_t row = 0; row < s.Hkv * s.N; ++row) {
            for (int64_t c = 0; c < blocks.M; ++c) {
              if (whole.pool.rng().below(3) > 0) blocks.attend(row, c);
            }
          }
          BlockSet set = blocks.set;
          set.window = window;
          whole.forward(set);
          for (int64_t first = 0; first < s.N; first += size) {
            const int64_t count = std::min(size, s.N - first), words = set.mask[3];
            // Rows of this piece, wider than its blocks: as allocated for the longest sequence.
            const Tensor mask = pieces.pool.make({1, s.Hkv, count, words + 1}, DType::u64);
            const Tensor bias = pieces.pool.make({1, s.Hkv, count, blocks.M + 3});
            for (int64_t row = 0; row < s.Hkv * count; ++row) {
              const int64_t from = blocks.row(0, row / count, first + row % count);
              std::copy_n(set.mask.ptr<uint64_t>() + from * words, words,
                          mask.ptr<uint64_t>() + row * mask[3]);
              std::copy_n(set.bias.ptr<double>() + from * blocks.M, blocks.M,
                          bias.ptr<double>() + row * bias[3]);
            }
            const Tensor lse = pieces.pool.make({1, s.Hq, count});
            forward_piece(pieces, {.block = block, .mask = mask, .bias = bias, .window = window},
                          first, count, prepared ? pieces.keys : Tensor{}, lse);
            for (int64_t i = 0; i < s.Hq * count; ++i) {
              const int64_t at = i / count * s.N + first + i % count;
              if (std::isfinite(get(whole.lse, at))) {
                EXPECT_NEAR(get(lse, i), get(whole.lse, at), 1e-12);
              }
            }
          }
          EXPECT_LT(relative_error(pieces.out.value, values(whole.out.value)), 1e-12);
          EXPECT_EQ(values(pieces.read), values(whole.read));
        }
      }
    }
  }
}

TEST(Engine, PiecesSeeTheRunsThatAreComplete) {
  const Sizes s{1, 4, 2, 61, 8};
  for (const Runs runs : {Runs{8, 4}, Runs{5, 3}}) {
    AttentionCase whole(s, DType::f64), pieces(s, DType::f64);
    const BlockSet set{.block = 4, .keys = runs};
    const int64_t W = runs.within(s.N);
    whole.kernels.attention(whole.q.value, whole.k.value.slice(2, 0, W),
                            whole.v.value.slice(2, 0, W), set, whole.o.value, whole.lse, whole.keys,
                            whole.read);
    for (int64_t first = 0; first < s.N; first += 3) {
      const int64_t count = std::min<int64_t>(3, s.N - first);
      forward_piece(pieces, set, first, count, {}, pieces.pool.make({1, s.Hq, count}));
    }
    EXPECT_LT(relative_error(pieces.out.value, values(whole.out.value)), 1e-12);
    EXPECT_EQ(values(pieces.read), values(whole.read));
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
