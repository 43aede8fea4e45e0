#pragma once
// One attention problem on the GPU and on the CPU: its tensors, at random, and how far what the GPU
// leaves is from what the CPU does.
#include <algorithm>

#include "tests/kernels/gpu.h"

namespace entrain {

struct AttentionSizes {
  int64_t B, Hq, Hkv, N, D;
};
struct AttentionOptions {
  int64_t block = 64, window = 0;
  Runs keys = {};
  int64_t first = 0;
  bool mask = false, bias = false;
  // Of blocks, besides a query's own: how many are attended, and how many neighbouring queries
  // attend the same ones. A density of -1 varies, with queries that attend all and that attend
  // none.
  double density = -1;
  int64_t alike = 1;
};
struct AttentionSetup {
  const char* name;
  AttentionSizes s;
  AttentionOptions o = {};
};

/// q, k, v, gradients and what else one attention needs, on both.
class AttentionTwin {
 public:
  AttentionTwin(const AttentionSetup& c, DType real)
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
    const double* sums = dbias.cpu.ptr<double>();
    const bool some =
        std::any_of(sums, sums + dbias.cpu.numel(), [](double x) { return std::abs(x) > 1e-9; });
    if (with_dbias && some) {
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

  const AttentionSizes s;
  const AttentionOptions o;
  const int64_t keys, M, total;
  Twin qkv, kv, dout, out, dqkv, dkv, lse, dbias, read, mask, bias;

 private:
  /// Heads [first, first + count) of rows of tokens, as a projection leaves them: [B, H, N, D].
  static Tensor heads(const Tensor& rows, int64_t first, int64_t count, int64_t D) {
    return rows.slice(2, first * D, count * D).split(2, D).transpose(1, 2);
  }

  /// |gpu - cpu| / |cpu| of views [B, H, N, D], the GPU's values being on the host by now.
  static double error_of(const Tensor& is, const Tensor& should) {
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

  /// Also blocks that a query does not see yet.
  void choose_blocks() {
    mask = Twin({s.B, s.Hkv, s.N, (M + 63) / 64 + 1}, DType::u64);
    for (int64_t row = 0; row < s.B * s.Hkv * s.N; ++row) {
      Rng rng(4, static_cast<uint64_t>(row / s.N * s.N + row % s.N / o.alike));
      uint64_t* words = mask.cpu.ptr<uint64_t>() + row * mask.cpu[3];
      const uint64_t kind = o.density < 0 ? rng.below(8) : 2;
      const double density = o.density < 0 ? 1 / static_cast<double>(2 + row / 50 % 8) : o.density;
      const int64_t own = (o.first + row % s.N) / o.block;
      for (int64_t x = 0; x < M; ++x) {
        const bool some = rng.uniform() < density || x == own;
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

}  // namespace entrain
