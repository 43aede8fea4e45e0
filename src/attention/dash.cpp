// DashAttention (arXiv 2605.18753): chunk summaries learned from the keys are scored by
// alpha-entmax, whose support picks the chunks of each query and whose weights become a prior of
// the token softmax. The prior's gradient trains queries, keys and summaries alike.
#include <algorithm>

#include "attention/record_attention.h"
#include "attention/registry.h"
#include "core/mirror.h"

namespace entrain {
namespace {

int64_t chunks_in(int64_t tokens, int64_t chunk) {
  return (tokens + chunk - 1) / chunk;
}

class DashAttention : public AttentionMethod {
 public:
  explicit DashAttention(const AttentionConfig& c)
      : learned_summaries_(c.summaries == "learned"), router_learns_(c.router_gradient) {
    routing_.chunk = c.chunk;
    routing_.sigma = c.sigma;
    routing_.prior_eps = c.prior_eps;
    routing_.center = c.center;
    routing_.init_blocks = c.init_blocks;
    routing_.local_blocks = c.local_blocks;
    routing_.aggregation = c.aggregation == "softmax" ? Aggregation::softmax : Aggregation::entmax;
    routing_.alpha_gamma = knobs_.host().ptr<double>();
    *alpha() = c.alpha;
    *gamma() = c.gamma;
  }
  DashAttention(const DashAttention&) = delete;  // routing_ points into it
  DashAttention& operator=(const DashAttention&) = delete;

  /// The authors' release stores the summary queries flat, and starts them at 0: mean pooling.
  std::vector<ParamSpec> params(const HeadShape& s) const override {
    if (!learned_summaries_) return {};
    return {{.name = "indexer_q", .shape = {s.n_kv_head * s.head_dim}, .decay = false}};
  }

  double* alpha() override { return knobs_.host().ptr<double>(); }
  double* gamma() override { return knobs_.host().ptr<double>() + 1; }

  /// The summaries of complete chunks. bf16 models read no more of them than f32 holds.
  std::vector<CacheSpec> cache(const HeadShape& s, int64_t tokens, DType real) const override {
    const DType dtype = real == DType::bf16 ? DType::f32 : DType::f64;
    return {{{1, s.n_kv_head, chunks_in(tokens, routing_.chunk), s.head_dim}, dtype}};
  }

  Tensor record(Tape& tape, const AttentionInput& in, Var o) const override {
    const DashRouting routing = routing_;
    const Var q = in.q, k = in.k;
    const Var summary = learned_summaries_ ? in.params.at(0) : Var{};
    const int64_t B = q.value[0], Hq = q.value[1], N = q.value[2], D = q.value[3];
    const int64_t Hkv = k.value[1], M = chunks_in(k.value[2], routing.chunk);
    const Queries queries = in.queries();

    const Tensor kbar = queries.decoding() ? in.cache.at(0) : tape.keep({B, Hkv, M, D}, DType::f64);
    const Tensor tau = tape.keep({B, Hq, N}, DType::f64);
    const Shape per_chunk{B, Hkv, N, M};
    const Var bias = router_learns_ ? tape.var(per_chunk, tape.sum_dtype())
                                    : Var{tape.keep(per_chunk, tape.sum_dtype()), {}};
    const BlockSet blocks{.block = routing.chunk,
                          .mask = tape.keep({B, Hkv, N, (M + 63) / 64}, DType::u64),
                          .bias = bias.value};

    Tensor dkbar, route_scratch;
    if (tape.training()) dkbar = tape.scratch(kbar.shape, DType::f64);
    if (!queries.decoding()) {
      const int64_t elements = with_kernels(tape.device(), [&](auto kernels) {
        const int64_t forward = kernels.dash_route_scratch(q.value.shape, kbar.shape);
        if (!tape.training()) return forward;
        return std::max(forward, kernels.dash_route_backward_scratch(q.value.shape, kbar.shape));
      });
      route_scratch = tape.scratch({elements}, DType::f64);
    }
    tape.record(
        "routing", bias.value, q.grad,
        [=, read = in.read, entropy = in.entropy](auto kernels) {
          const int64_t c = queries.begin() / routing.chunk;  // earlier chunks have their summary
          const int64_t token = c * routing.chunk;
          const bool complete = !queries.decoding() || queries.end() / routing.chunk > c;
          const bool routed_over = (queries.end() - 1) / routing.chunk > c;  // by queries after it
          if (complete) {
            kernels.dash_summaries(k.value.slice(2, token, queries.end() - token), summary.value,
                                   routing.chunk,
                                   kbar.slice(2, c, chunks_in(queries.end(), routing.chunk) - c));
          }
          kernels.dash_route(q.value, kbar, routing, tau, queries.attend(blocks), {}, route_scratch,
                             read, complete && !routed_over);
          if (entropy) kernels.dash_entropy(q.value, kbar, routing, tau, entropy);
        },
        [=](auto kernels) {  // adds to what attention left in q's and k's gradients
          if (!bias.grad) return;
          kernels.dash_route_backward(q.value, kbar, routing, tau, blocks, bias.grad, q.grad, dkbar,
                                      route_scratch);
          kernels.dash_summaries_backward(k.value, summary.value, routing.chunk, dkbar, k.grad,
                                          summary.grad);
        },
        {k.grad, summary.grad});

    record_attention(tape, in, blocks, bias.grad, o);
    return blocks.mask;
  }

 private:
  Pinned knobs_{{2}, DType::f64};  // {alpha, gamma}
  bool learned_summaries_, router_learns_;
  DashRouting routing_;
};

}  // namespace

std::unique_ptr<AttentionMethod> make_dash_attention(const AttentionConfig& config) {
  return std::make_unique<DashAttention>(config);
}

}  // namespace entrain
