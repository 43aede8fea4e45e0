// Attention on the GPU, over any set of blocks, against the CPU's in double.
#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

struct Sizes {
  int64_t B, Hq, Hkv, N, D;
};
struct Options {
  int64_t block = 64, window = 0;
  Runs keys = {};
  int64_t first = 0;
  bool mask = false, bias = false;
};
struct Case {
  const char* name;
  Sizes s;
  Options o = {};
};

// Groups of 1 to 130, head_dims that fill tiles and that do not, lengths that are multiples of
// nothing, blocks that divide a tile, that a tile divides, and neither.
const Case cases[] = {
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

/// Heads [first, first + count) of rows of tokens, as a projection leaves them: [B, H, N, D].
Tensor heads(const Tensor& rows, int64_t first, int64_t count, int64_t D) {
  return rows.slice(2, first * D, count * D).split(2, D).transpose(1, 2);
}

/// |gpu - cpu| / |cpu| of views [B, H, N, D], the GPU's values being on the host by now.
double error_of(const Tensor& is, const Tensor& should) {
  double difference = 0, norm = 0;
  for (int64_t b = 0; b < is[0]; ++b) {
    for (int64_t h = 0; h < is[1]; ++h) {
      for (int64_t i = 0; i < is[2]; ++i) {
        for (int64_t d = 0; d < is[3]; ++d) {
          const auto at = [&](const Tensor& t) {
            return b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + d;
          };
          const double y = should.ptr<double>()[at(should)], x = is.ptr<float>()[at(is)];
          if (!std::isfinite(x)) return std::numeric_limits<double>::infinity();
          difference += (x - y) * (x - y);
          norm += y * y;
        }
      }
    }
  }
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

struct Memory {
  Memory(int64_t bytes, Device device)
      : buffer(static_cast<size_t>(bytes), device),
        tensor(Tensor::of(buffer.data(), {bytes}, DType::u8, device)) {}
  Buffer buffer;
  Tensor tensor;
};

/// q, k, v, gradients and what else one attention needs, on both.
class Attention {
 public:
  Attention(const Case& c, DType real)
      : s(c.s),
        o(c.o),
        keys(o.keys.within(o.first + s.N)),
        M((keys + o.block - 1) / o.block),
        total(o.first + s.N),
        qkv(Twin::normal({s.B, total, width()}, real, 1)),
        kv(Twin::normal({s.B, std::max<int64_t>(1, keys), 2 * s.Hkv * s.D}, real, 2)),
        dout(Twin::normal({s.B, total, s.Hq * s.D}, real, 3)),
        out({s.B, total, s.Hq * s.D}, real),
        dqkv({s.B, total, width()}, real),
        dkv({s.B, std::max<int64_t>(1, keys), 2 * s.Hkv * s.D}, real),
        lse({s.B, s.Hq, s.N}, DType::f32),
        dbias({s.B, s.Hkv, s.N, std::max<int64_t>(1, M)}, DType::f32),
        read({s.Hkv, read_fields}, DType::f64) {
    if (o.mask) choose_blocks();
    if (o.bias) choose_biases();
  }

  /// With scratch, a library may compute dense problems in bf16.
  void forward(bool with_scratch = false) {
    const Tensor q = queries(qkv.gpu), k = keys_of(&Twin::gpu, 0);
    const Memory scratch(on_gpu.attention_scratch(q, k), Device::cuda);
    on_gpu.attention(q, k, keys_of(&Twin::gpu, 1), blocks(&Twin::gpu), queries(out.gpu), lse.gpu,
                     with_scratch ? scratch.tensor : Tensor{}, read.gpu);
    gpu::synchronize();  // before scratch goes
  }
  void backward(bool add_dq = false, bool with_dbias = true) {
    backward_on(&Twin::gpu, on_gpu, Device::cuda, add_dq, with_dbias);
  }
  void forward_on_cpu() {
    on_cpu.attention(queries(qkv.cpu), keys_of(&Twin::cpu, 0), keys_of(&Twin::cpu, 1),
                     blocks(&Twin::cpu), queries(out.cpu), lse.cpu, {}, read.cpu);
  }
  void backward_on_cpu(bool add_dq = false) {
    backward_on(&Twin::cpu, on_cpu, Device::cpu, add_dq, true);
  }

  void expect_forward(double tolerance) {
    EXPECT_LT(error_of(queries(out.fetch()), queries(out.cpu)), tolerance);
    EXPECT_LT(lse.error(), tolerance);
    const Tensor is = lse.fetch();
    for (int64_t i = 0; i < is.numel(); ++i) {  // +infinity where a row attends nothing
      ASSERT_EQ(std::isinf(is.ptr<float>()[i]), std::isinf(lse.cpu.ptr<double>()[i]));
    }
    EXPECT_EQ(std::memcmp(read.fetch().data, read.cpu.data, read.cpu.bytes()), 0);
  }
  void expect_gradients(double tolerance, bool with_dbias = true) {
    EXPECT_LT(error_of(queries(dqkv.fetch()), queries(dqkv.cpu)), tolerance);
    if (keys == 0) return;
    Twin& gradients = packed() ? dqkv : dkv;
    const Tensor is = gradients.fetch();
    EXPECT_LT(error_of(keys_in(is, 0), keys_in(gradients.cpu, 0)), tolerance);
    EXPECT_LT(error_of(keys_in(is, 1), keys_in(gradients.cpu, 1)), tolerance);
    // A query's biases sum to a shift of all its logits, which has no gradient: of one block
    // nothing is left but rounding, o's in the first place, and of two blocks little else.
    if (with_dbias && M > 1) {
      EXPECT_LT(dbias.error(), 4 * tolerance);
    }
  }
  /// All that forward and backward leave on the GPU.
  std::vector<char> bytes() {
    std::vector<char> all;
    for (Twin* t : {&out, &lse, &dqkv, &dkv, &dbias}) {
      const Tensor x = t->fetch();
      const char* from = static_cast<const char*>(x.data);
      all.insert(all.end(), from, from + x.bytes());
    }
    return all;
  }

  const Sizes s;
  const Options o;
  const int64_t keys, M, total;
  Twin qkv, kv, dout, out, dqkv, dkv, lse, dbias, read, mask, bias;

 private:
  int64_t width() const { return (s.Hq + 2 * s.Hkv) * s.D; }
  /// Single tokens are packed with their queries; runs have their own keys and values.
  bool packed() const { return o.keys.length == 1; }

  Tensor queries(const Tensor& rows) const {
    return heads(rows, 0, s.Hq, s.D).slice(2, o.first, s.N);
  }
  Tensor keys_in(const Tensor& rows, int which) const {
    return heads(rows, (packed() ? s.Hq : 0) + which * s.Hkv, s.Hkv, s.D).slice(2, 0, keys);
  }
  Tensor keys_of(Tensor Twin::*side, int which) {
    return keys_in((packed() ? qkv : kv).*side, which);
  }
  BlockSet blocks(Tensor Twin::*side) const {
    BlockSet set{.block = o.block, .window = o.window, .keys = o.keys, .first = o.first};
    if (o.mask) set.mask = mask.*side;
    if (o.bias) set.bias = bias.*side;
    return set;
  }

  /// Blocks at random and a query's own, some queries all blocks, some none; blocks that it does
  /// not see yet, too.
  void choose_blocks() {
    mask = Twin({s.B, s.Hkv, s.N, (M + 63) / 64 + 1}, DType::u64);
    Rng rng(4, 0);
    for (int64_t row = 0; row < s.B * s.Hkv * s.N; ++row) {
      uint64_t* words = mask.cpu.ptr<uint64_t>() + row * mask.cpu[3];
      const uint64_t kind = rng.below(8), sparse = 2 + row / 50 % 8;
      const int64_t own = (o.first + row % s.N) / o.block;
      for (int64_t x = 0; x < M; ++x) {
        const bool some = rng.below(sparse) == 0 || x == own;
        if (kind == 1 || (kind > 1 && some)) words[x / 64] |= uint64_t{1} << (x % 64);
      }
    }
    mask.send();
  }
  /// Large ones where they must not be read. While decoding there is room for later blocks.
  void choose_biases() {
    const int64_t room = M + (o.first > 0 ? 2 : 0);
    bias = Twin::normal({s.B, s.Hkv, s.N, room}, DType::f32, 5);
    for (int64_t row = 0; row < s.B * s.Hkv * s.N; ++row) {
      for (int64_t x = 0; x < room; ++x) {
        const bool attended =
            !o.mask || (mask.cpu.ptr<uint64_t>()[row * mask.cpu[3] + x / 64] >> (x % 64) & 1);
        if (x >= M || !attended) bias.cpu.ptr<double>()[row * room + x] = 1000;
      }
    }
    bias.send();
  }

  template <class K>
  void backward_on(Tensor Twin::*side, const K& kernels, Device device, bool add_dq,
                   bool with_dbias) {
    const Tensor q = queries(qkv.*side);
    // Runs of tokens are fewer than tokens, for which scratch is asked.
    const Tensor tokens = heads(qkv.*side, s.Hq, s.Hkv, s.D);
    const Memory scratch(kernels.attention_backward_scratch(q, tokens), device);
    Twin& gradients = packed() ? dqkv : dkv;
    kernels.attention_backward(q, keys_of(side, 0), keys_of(side, 1), queries(out.*side),
                               queries(dout.*side), lse.*side, blocks(side), queries(dqkv.*side),
                               keys_in(gradients.*side, 0), keys_in(gradients.*side, 1),
                               with_dbias ? dbias.*side : Tensor{}, scratch.tensor, add_dq);
    if (device == Device::cuda) gpu::synchronize();  // before its scratch goes
  }
};

TEST(AttentionKernel, ForwardIsTheCpus) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(std::string(c.name) + ", " + name_of(real));
      Attention a(c, real);
      a.forward();
      a.forward_on_cpu();
      a.expect_forward(tolerance(real));
    }
  }
}

TEST(AttentionKernel, BackwardIsTheCpus) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      if (c.o.first > 0) continue;  // decoding has no backward pass
      SCOPED_TRACE(std::string(c.name) + ", " + name_of(real));
      Attention a(c, real);
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
      Attention a({"dense", {2, 8, 2, 300, D}}, real);
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
      Attention a({"", {1, 4, 2, 190, D}, {.mask = true}}, real);
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
      const Case c{"", {2, 8, 2, 1000, 64}, {.block = block, .mask = true, .bias = true}};
      std::vector<char> first;
      for (int run = 0; run < 3; ++run) {
        Attention a(c, real);
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
      Attention a({"", {1, 1, 1, 100, 64}}, real);
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
