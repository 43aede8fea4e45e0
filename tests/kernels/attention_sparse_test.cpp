// Attention over blocks of keys of random shapes, against the CPU's in double: what Hopper's
// block-sparse engine takes and, beside it, what it leaves to the others.
#include <sstream>

#include "tests/kernels/attention_twin.h"

namespace entrain {
namespace {

/// Sizes that keep the CPU's share of a test under a second.
AttentionSetup random_setup(uint64_t seed) {
  Rng rng(seed, 7);
  const auto one_of = [&](std::initializer_list<int64_t> choices) {
    return choices.begin()[rng.below(choices.size())];
  };
  const auto between = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng.below(static_cast<uint64_t>(high - low + 1)));
  };
  AttentionSetup setup{"random", {}};
  const int64_t g = one_of({1, 2, 3, 4, 8, 16}), Hkv = g > 4 ? 1 : between(1, 2);
  const auto longest = static_cast<int64_t>(std::sqrt(1.5e6 / static_cast<double>(g * Hkv)));
  setup.s = {.B = between(1, 2),
             .Hq = g * Hkv,
             .Hkv = Hkv,
             .N = between(64, std::min<int64_t>(700, longest)),
             .D = one_of({64, 128})};
  AttentionOptions& o = setup.o;
  o.block = one_of({16, 32, 64, 64, 128});
  o.mask = rng.below(5) > 0;
  o.bias = rng.below(2) > 0;
  if (rng.below(4) == 0) o.window = between(30, 200);
  if (rng.below(4) == 0) o.keys = {between(2, 20), between(1, 4)};
  const uint64_t density = rng.below(5);
  o.density = density == 0 ? 0 : density == 1 ? 1 : density == 2 ? -1 : 0.2;
  o.alike = one_of({1, 16, 64});
  return setup;
}

std::string describe(const AttentionSetup& setup, uint64_t seed, DType real) {
  const auto& [B, Hq, Hkv, N, D] = setup.s;
  const AttentionOptions& o = setup.o;
  std::ostringstream text;
  text << "seed " << seed << ' ' << name_of(real);
  for (const int64_t x : {B, Hq, Hkv, N, D, o.block, o.window, o.keys.length, o.keys.stride}) {
    text << ' ' << x;
  }
  text << (o.mask ? " mask" : "") << (o.bias ? " bias" : "") << " density " << o.density;
  return text.str();
}

TEST(SparseAttention, RandomProblemsAreTheCpus) {
  NEEDS_GPU();
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const AttentionSetup setup = random_setup(seed);
    const DType real = seed % 4 == 3 ? DType::f32 : DType::bf16;
    SCOPED_TRACE(describe(setup, seed, real));
    const bool add_dq = seed % 3 == 0, with_dbias = seed % 2 == 0;
    // Of a query that attends one block, dbias is nothing but rounding.
    const bool compare_dbias = with_dbias && (!setup.o.mask || setup.o.density != 0);
    AttentionTwin a(setup, real);
    if (add_dq) a.dqkv = Twin::normal(a.dqkv.cpu.shape, real, 6);
    a.forward();
    a.backward(add_dq, with_dbias);
    a.forward_on_cpu();
    a.backward_on_cpu(add_dq);
    a.expect_forward(tolerance(real));
    a.expect_gradients(tolerance(real), compare_dbias);
    if (add_dq) continue;
    const std::vector<char> first = a.bytes();
    a.forward();
    a.backward(false, with_dbias);
    EXPECT_TRUE(a.bytes() == first);
  }
}

/// More queries than one round of thread blocks takes, and keys beyond a stage ring; whole tiles of
/// keys that only some warpgroups attend; a query in several warps.
TEST(SparseAttention, LongProblemsAreTheCpus) {
  NEEDS_GPU();
  const AttentionSetup setups[] = {
      {"g 32", {1, 32, 1, 500, 64}, {.mask = true, .bias = true, .density = 0.2, .alike = 16}},
      {"g 16", {1, 16, 1, 1100, 128}, {.mask = true, .bias = true, .density = 0.1}},
      {"g 4", {1, 4, 1, 2500, 64}, {.mask = true, .bias = true, .density = 0.1, .alike = 8}},
      {"g 1", {1, 1, 1, 5000, 64}, {.mask = true, .density = 0.05, .alike = 64}},
      {"g 1, some attend all", {1, 1, 1, 3000, 64}, {.mask = true, .alike = 64}},
      {"g 2, block 128", {1, 2, 1, 3000, 128}, {.block = 128, .mask = true, .density = 0.1}},
  };
  for (const AttentionSetup& setup : setups) {
    SCOPED_TRACE(setup.name);
    AttentionTwin a(setup, DType::bf16);
    a.forward();
    a.backward();
    a.forward_on_cpu();
    a.backward_on_cpu();
    a.expect_forward(tolerance(DType::bf16));
    a.expect_gradients(tolerance(DType::bf16));
  }
}

/// All queries attend the first block of 64 keys, those from `apart` on block 3 too, where token
/// 200 has a value that is not a number in k or v.
class SickKey {
 public:
  static constexpr int64_t apart = 448;  // no warpgroup has queries of both kinds

  SickKey(int64_t D, bool attended)
      : a({"", {1, 4, 1, 512, D}, {.mask = true, .bias = true}}, DType::bf16) {
    for (int64_t i = 0; i < a.s.N; ++i) {
      uint64_t* words = a.mask.cpu.ptr<uint64_t>() + i * a.mask.cpu[3];
      words[0] = attended && i >= apart ? 0b1001 : 0b0001;
      for (int64_t c = 0; c < a.M; ++c) a.bias.cpu.ptr<double>()[i * a.M + c] = 0.25;
    }
    a.mask.send();
    a.bias.send();
  }
  void infect(int64_t which) {
    double* token = a.qkv.cpu.ptr<double>() + 200 * a.qkv.cpu[2];
    token[(a.s.Hq + which) * a.s.D + 5] = std::numeric_limits<double>::quiet_NaN();
    a.qkv.send();
  }
  std::vector<char> run() {
    a.forward();
    a.backward();
    return a.bytes();
  }

  AttentionTwin a;
};

TEST(SparseAttention, WhatIsNotANumberShowsWhereItIsAttended) {
  NEEDS_GPU();
  for (const int64_t D : {64, 128}) {
    for (const int64_t which : {0, 1}) {  // k, v
      SickKey unattended(D, false);
      const std::vector<char> well = unattended.run();
      unattended.infect(which);
      EXPECT_TRUE(unattended.run() == well);

      SickKey attended(D, true);
      attended.infect(which);
      attended.run();
      const Tensor o = attended.a.out.fetch();
      const Tensor d = attended.a.dqkv.fetch();
      for (int64_t i = 0; i < attended.a.s.N; ++i) {
        const bool sick = i >= SickKey::apart;
        ASSERT_EQ(std::isnan(o.ptr<float>()[i * o[2] + 5]), sick) << i;
        ASSERT_EQ(std::isnan(d.ptr<float>()[i * d[2] + 5]), sick) << i;
      }
    }
  }
}

}  // namespace
}  // namespace entrain
