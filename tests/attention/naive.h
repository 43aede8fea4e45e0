#pragma once
// Attention by its definition, dense and in double: what the kernels are held against. And inputs
// laid out as the decoder lays them out, as views into packed projections.
#include <functional>

#include "kernels/kernels.h"
#include "tests/support.h"

namespace entrain {

/// q, k, v, o and all gradients of one attention, and its scratch memory.
class AttentionCase {
 public:
  struct Sizes {
    int64_t B, Hq, Hkv, N, D;
  };

  AttentionCase(Sizes sizes, DType real, uint64_t seed = 1)
      : s(sizes),
        pool(real, seed),
        qkv(pool.leaf({s.B, s.N, (s.Hq + 2 * s.Hkv) * s.D})),
        out(pool.leaf({s.B, s.N, s.Hq * s.D})),
        q(heads(qkv, 0, s.Hq)),
        k(heads(qkv, s.Hq, s.Hkv)),
        v(heads(qkv, s.Hq + s.Hkv, s.Hkv)),
        o(heads(out, 0, s.Hq)),
        lse(pool.make({s.B, s.Hq, s.N})),
        keys(pool.make({s.B, s.Hkv, s.N, s.D})),
        read(pool.make({s.Hkv, read_fields}, DType::f64)),
        scratch(pool.make({kernels.attention_backward_scratch(q.value, k.value)}, DType::u8)) {
    for (const Tensor& t : {qkv.grad, out.value}) fill(t, NAN);  // all must be written
    std::memset(scratch.data, 0xff, scratch.bytes());            // NaN
    for (int64_t i = 0; i < out.grad.numel(); ++i) put(out.grad, i, pool.rng().normal());
  }

  void forward(const BlockSet& blocks) const {
    kernels.attention(q.value, k.value, v.value, blocks, o.value, lse, keys, read);
  }
  void backward(const BlockSet& blocks, Tensor dbias = {}) const {
    kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, blocks, q.grad,
                               k.grad, v.grad, dbias, scratch);
  }
  double read_sum(ReadField field) const {
    double sum = 0;
    for (int64_t r = 0; r < s.Hkv; ++r) sum += read.ptr<double>()[r * read_fields + field];
    return sum;
  }

  const Sizes s;
  Kernels<Device::cpu> kernels;
  Pool pool;
  const Var qkv, out;  // packed
  const Var q, k, v, o;
  const Tensor lse, keys, read, scratch;

 private:
  Tensor heads(const Tensor& x, int64_t first, int64_t count) const {
    return x.slice(2, first * s.D, count * s.D).split(2, s.D).transpose(1, 2);
  }
  Var heads(const Var& x, int64_t first, int64_t count) const {
    return {heads(x.value, first, count), heads(x.grad, first, count)};
  }
};

/// Whether query i of kv head r attends block c, causality aside, and with what bias.
using Allowed = std::function<bool(int64_t b, int64_t r, int64_t i, int64_t c)>;
using Bias = std::function<double(int64_t b, int64_t r, int64_t i, int64_t c)>;

struct Naive {
  std::vector<double> o, dq, dk, dv, dbias;
  double pairs = 0;
};

inline Naive naive_attention(const AttentionCase& a, int64_t block, const Allowed& allowed,
                             const Bias& bias) {
  const auto [B, Hq, Hkv, N, D] = a.s;
  const int64_t g = Hq / Hkv, M = (N + block - 1) / block;
  const std::vector<double> q = values(a.q.value), k = values(a.k.value), v = values(a.v.value),
                            dout = values(a.o.grad);
  const auto zeros = [](int64_t n) { return std::vector<double>(static_cast<size_t>(n)); };
  Naive r{zeros(B * Hq * N * D), zeros(B * Hq * N * D), zeros(B * Hkv * N * D),
          zeros(B * Hkv * N * D), zeros(B * Hkv * N * M)};
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < Hq; ++h) {
      for (int64_t i = 0; i < N; ++i) {
        const int64_t kv = b * Hkv + h / g;
        const double* qi = q.data() + ((b * Hq + h) * N + i) * D;
        const double* doi = dout.data() + ((b * Hq + h) * N + i) * D;
        double* oi = r.o.data() + ((b * Hq + h) * N + i) * D;
        double* dqi = r.dq.data() + ((b * Hq + h) * N + i) * D;
        const auto dot = [&](const double* x, const double* y) {
          double sum = 0;
          for (int64_t d = 0; d < D; ++d) sum += x[d] * y[d];
          return sum;
        };
        std::vector<int64_t> js;
        std::vector<double> p;
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j <= i; ++j) {
          const int64_t c = j / block;
          if (!allowed(b, h / g, i, c)) continue;
          js.push_back(j);
          p.push_back(scale * dot(qi, k.data() + (kv * N + j) * D) + bias(b, h / g, i, c));
          top = std::max(top, p.back());
        }
        if (h % g == 0) r.pairs += static_cast<double>(js.size());
        for (double& x : p) sum += x = std::exp(x - top);
        for (size_t n = 0; n < js.size(); ++n) {
          p[n] /= sum;
          for (int64_t d = 0; d < D; ++d) {
            oi[d] += p[n] * v[static_cast<size_t>((kv * N + js[n]) * D + d)];
          }
        }
        const double delta = dot(oi, doi);
        for (size_t n = 0; n < js.size(); ++n) {
          const int64_t at = (kv * N + js[n]) * D;
          const double ds = p[n] * (dot(doi, v.data() + at) - delta);
          for (int64_t d = 0; d < D; ++d) {
            const auto x = static_cast<size_t>(at + d);
            r.dv[x] += p[n] * doi[d];
            r.dk[x] += ds * scale * qi[d];
            dqi[d] += ds * scale * k[x];
          }
          r.dbias[static_cast<size_t>((kv * N + i) * M + js[n] / block)] += ds;
        }
      }
    }
  }
  return r;
}

}  // namespace entrain
