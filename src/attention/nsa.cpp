// NSA (arXiv 2502.11089): each query attends learned summaries of windows, the blocks that those
// weigh most, and the last tokens, by keys and values of its own for each, mixed by gates from the
// layer's input. k_proj and v_proj serve the selected blocks, so that a dense model maps onto it.
//
// Beside a dense checkpoint it starts near the dense model: the other branches copy k_proj and
// v_proj, windows are compressed to their means, and the gates are 0.02, 0.88 and 0.12 for the
// compressed, selected and window branch. From scratch all gates start near 0.5.
#include "attention/compression.h"
#include "attention/nsa_branches.h"
#include "attention/registry.h"

namespace entrain {
namespace {

class NsaAttention : public AttentionMethod {
 public:
  explicit NsaAttention(const AttentionConfig& c)
      : selection_{.block = c.block,
                   .topk = c.topk,
                   .init_blocks = c.init_blocks,
                   .local_blocks = c.local_blocks,
                   .length = c.l,
                   .stride = c.d,
                   .score = BlockScore::sum},
        window_(c.window),
        compression_(c.compression, selection_.runs()) {}

  std::vector<Projection> projections(const HeadShape& s) const override {
    const auto kv = [&](const char* name, bool rotary, const char* like) {
      return Projection{name, s.n_kv_head, s.head_dim, rotary, {.like = like}, true};
    };
    const auto gate = [&](const char* name) { return Projection{name, s.n_head, 1, false, {}}; };
    return {kv("k_cmp_proj.weight", true, "k_proj.weight"),
            kv("v_cmp_proj.weight", false, "v_proj.weight"),
            kv("k_win_proj.weight", true, "k_proj.weight"),
            kv("v_win_proj.weight", false, "v_proj.weight"),
            gate("gate_cmp.weight"),
            gate("gate_slc.weight"),
            gate("gate_win.weight")};
  }

  std::vector<ParamSpec> params(const HeadShape& s) const override {
    const auto bias = [&](const char* name, double beside_dense) {
      return ParamSpec{.name = name,
                       .shape = {s.n_head},
                       .decay = false,
                       .adopt = Adopt{.like = {}, .value = beside_dense}};
    };
    std::vector<ParamSpec> specs{bias("gate_cmp.bias", -4), bias("gate_slc.bias", 2),
                                 bias("gate_win.bias", -2)};
    for (const char* name : {"compress_k", "compress_v"}) {
      for (const ParamSpec& spec : compression_.params(name, s.head_dim)) specs.push_back(spec);
    }
    return specs;
  }

  int64_t products(const HeadShape& s, int64_t tokens) const override {
    return 2 * s.n_kv_head * compression_.products(s.head_dim, tokens);
  }

  /// Compressed keys and values.
  std::vector<CacheSpec> cache(const HeadShape& s, int64_t tokens, DType real) const override {
    const CacheSpec compressed{{1, s.n_kv_head, selection_.windows(tokens), s.head_dim}, real};
    return {compressed, compressed};
  }

  Tensor record(Tape& tape, const AttentionInput& in, Var o) const override {
    const Var* x = in.projected.data();
    NsaInput branches{.q = in.q,
                      .kc = {},
                      .vc = {},
                      .ks = in.k,
                      .vs = in.v,
                      .kw = x[2],
                      .vw = x[3],
                      .gates = {},
                      .read = in.read,
                      .first = in.first};
    for (size_t i = 0; i < 3; ++i) branches.gates[i] = record_gate(tape, x[4 + i], in.params[i]);
    const std::span<const Var> learned = std::span(in.params).subspan(3);
    const size_t half = learned.size() / 2;
    const Queries queries = in.queries();
    const bool decoding = queries.decoding();
    branches.kc = compression_.record(tape, x[0], learned.first(half), queries,
                                      decoding ? in.cache.at(0) : Tensor{});
    branches.vc = compression_.record(tape, x[1], learned.last(half), queries,
                                      decoding ? in.cache.at(1) : Tensor{});
    return record_nsa(tape, selection_, window_, branches, o);
  }

 private:
  static Var record_gate(Tape& tape, Var logits, Var bias) {
    const Var gate = tape.var(logits.value.shape);
    tape.record(
        "gate", gate.value, logits.grad,
        [=](auto kernels) { kernels.gate(logits.value, bias.value, gate.value); },
        [=](auto kernels) { kernels.gate_backward(gate.grad, gate.value, logits.grad, bias.grad); },
        {bias.grad});
    return gate;
  }

  BlockSelection selection_;
  int64_t window_;
  Compression compression_;
};

}  // namespace

std::unique_ptr<AttentionMethod> make_nsa_attention(const AttentionConfig& config) {
  return std::make_unique<NsaAttention>(config);
}

}  // namespace entrain
