// Attention on the GPU, over any set of blocks, against the CPU's in double.
#include "tests/kernels/attention_twin.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

// Groups of 1 to 130, head_dims that fill tiles and that do not, lengths that are multiples of
// nothing, blocks that divide a tile, that a tile divides, and neither.
const AttentionSetup cases[] = {
    {"dense", {2, 4, 2, 150, 64}},
    {"dense, long", {1, 2, 1, 530, 64}},
    {"dense, g 1", {1, 2, 2, 200, 128}},
    {"dense, g 3", {1, 6, 2, 131, 80}},
    {"dense, g 16", {1, 16, 1, 77, 16}},
    {"dense, g 24, D 20", {1, 24, 1, 30, 20}},
    {"dense, g 130", {1, 130, 1, 12, 16}},
    {"dense, D 256", {1, 4, 2, 90, 256}},
    {"dense, D 36", {1, 2, 1, 70, 36}},
    {"dense with biases", {1, 4, 2, 170, 32}, {.block = 32, .bias = true}},
    {"window", {1, 4, 2, 300, 64}, {.window = 70}},
    {"window of 3", {1, 4, 2, 100, 32}, {.window = 3}},
    {"window, masks", {1, 4, 1, 300, 64}, {.window = 100, .mask = true}},
    {"runs", {1, 4, 2, 333, 64}, {.keys = {32, 16}}},
    {"runs, many", {1, 4, 1, 1500, 32}, {.keys = {8, 4}}},
    {"runs, none complete", {1, 4, 2, 20, 64}, {.keys = {32, 16}}},
    {"runs, window", {1, 2, 1, 700, 32}, {.window = 9, .keys = {10, 3}}},
    {"masks", {2, 8, 2, 300, 64}, {.mask = true}},
    {"masks, one word is not enough", {1, 4, 1, 1500, 32}, {.block = 16, .mask = true}},
    {"masks and biases, block 16", {1, 4, 2, 250, 64}, {.block = 16, .mask = true, .bias = true}},
    {"masks and biases, block 32", {1, 2, 2, 250, 128}, {.block = 32, .mask = true, .bias = true}},
    {"masks and biases, block 64", {2, 8, 2, 500, 64}, {.block = 64, .mask = true, .bias = true}},
    {"masks and biases, block 128", {1, 6, 2, 600, 80}, {.block = 128, .mask = true, .bias = true}},
    {"masks and biases, block 20", {1, 4, 1, 333, 64}, {.block = 20, .mask = true, .bias = true}},
    {"masks and biases, block 100", {1, 4, 1, 333, 16}, {.block = 100, .mask = true, .bias = true}},
    {"masks and biases, block 1", {1, 4, 1, 150, 32}, {.block = 1, .mask = true, .bias = true}},
    {"masks and biases, one block", {1, 4, 2, 60, 64}, {.block = 64, .mask = true, .bias = true}},
    {"masks and biases, g 16", {1, 16, 1, 200, 64}, {.block = 16, .mask = true, .bias = true}},
    {"masks and biases, g 80", {1, 80, 1, 40, 32}, {.block = 16, .mask = true, .bias = true}},
    {"masks and biases, D 256", {1, 4, 2, 200, 256}, {.block = 64, .mask = true, .bias = true}},
    {"decoding", {2, 4, 2, 1, 64}, {.block = 16, .first = 211, .mask = true, .bias = true}},
    {"decoding, all keys", {1, 4, 2, 3, 128}, {.first = 300}},
    {"a piece", {1, 4, 2, 70, 64}, {.window = 90, .first = 130, .mask = true}},
    {"a piece of runs", {1, 4, 2, 40, 64}, {.keys = {32, 16}, .first = 200}},
};

TEST(AttentionKernel, ForwardIsTheCpus) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const AttentionSetup& c : cases) {
      SCOPED_TRACE(std::string(c.name) + ", " + name_of(real));
      AttentionTwin a(c, real);
      a.forward();
      a.forward_on_cpu();
      a.expect_forward(tolerance(real));
    }
  }
}

TEST(AttentionKernel, BackwardIsTheCpus) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const AttentionSetup& c : cases) {
      if (c.o.first > 0) continue;  // decoding has no backward pass
      SCOPED_TRACE(std::string(c.name) + ", " + name_of(real));
      AttentionTwin a(c, real);
      a.forward();
      a.backward();
      a.forward_on_cpu();
      a.backward_on_cpu();
      a.expect_gradients(tolerance(real));
    }
  }
}

TEST(AttentionKernel, WithScratchDenseAttentionIsTheSame) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t D : {64, 128}) {
      AttentionTwin a({"dense", {2, 8, 2, 300, D}}, real);
      a.forward(true);
      a.backward(false, false);
      a.forward_on_cpu();
      a.backward_on_cpu();
      a.expect_forward(tolerance(real));
      a.expect_gradients(tolerance(real), false);
    }
  }
}

TEST(AttentionKernel, AddsToTheGradientOfQueries) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t D : {64, 80}) {
      AttentionTwin a({"", {1, 4, 2, 190, D}, {.mask = true}}, real);
      a.dqkv = Twin::normal(a.dqkv.cpu.shape, real, 6);
      a.forward();
      a.backward(true);
      a.forward_on_cpu();
      a.backward_on_cpu(true);
      a.expect_gradients(tolerance(real));
    }
  }
}

TEST(AttentionKernel, EqualInputsGiveEqualBits) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t block : {16, 64, 128}) {
      const AttentionSetup c{"", {2, 8, 2, 1000, 64}, {.block = block, .mask = true, .bias = true}};
      std::vector<char> first;
      for (int run = 0; run < 3; ++run) {
        AttentionTwin a(c, real);
        a.forward();
        a.backward();
        const std::vector<char> bytes = a.bytes();
        if (run == 0) first = bytes;
        EXPECT_TRUE(bytes == first);
      }
    }
  }
}

TEST(AttentionKernel, WhatIsNotANumberShows) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t sick : {0, 1, 2}) {  // in q, k or v, of token 40
      SCOPED_TRACE(name_of(real) + std::string(" ") + std::to_string(sick));
      AttentionTwin a({"", {1, 1, 1, 100, 64}}, real);
      a.qkv.cpu.ptr<double>()[(40 * 3 + sick) * 64 + 5] = std::numeric_limits<double>::quiet_NaN();
      a.qkv.send();
      a.forward();
      a.backward();
      const Tensor o = a.out.fetch(), d = a.dqkv.fetch();
      const auto nan = [](const Tensor& rows, int64_t token, int64_t head) {
        return std::isnan(rows.ptr<float>()[token * rows[2] + head * 64 + 5]);
      };
      EXPECT_TRUE(nan(o, 40, 0));
      EXPECT_FALSE(nan(o, 39, 0) && sick == 0);  // it is of another row
      EXPECT_EQ(nan(o, 99, 0), sick > 0);
      for (const int64_t head : {1, 2}) EXPECT_TRUE(nan(d, 40, head) || sick == 2);
    }
  }
}

}  // namespace
}  // namespace entrain
