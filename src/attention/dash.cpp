// DashAttention (arXiv 2605.18753): chunk summaries learned from the keys are scored by
// alpha-entmax, whose support picks the chunks of each query and whose weights become a prior of
// the token softmax. The prior's gradient trains queries, keys and summaries alike.
#include "attention/registry.h"

namespace entrain {
namespace {

class DashAttention : public AttentionMethod {
 public:
  explicit DashAttention(const AttentionConfig& c)
      : alpha_(c.alpha),
        gamma_(c.gamma),
        learned_summaries_(c.summaries == "learned"),
        router_learns_(c.router_gradient) {
    routing_.chunk = c.chunk;
    routing_.sigma = c.sigma;
    routing_.prior_eps = c.prior_eps;
    routing_.center = c.center;
    routing_.init_blocks = c.init_blocks;
    routing_.local_blocks = c.local_blocks;
    routing_.aggregation = c.aggregation == "softmax" ? Aggregation::softmax : Aggregation::entmax;
    routing_.alpha = &alpha_;
    routing_.gamma = &gamma_;
  }
  DashAttention(const DashAttention&) = delete;  // routing_ points into it
  DashAttention& operator=(const DashAttention&) = delete;

  /// The authors' release stores the summary queries flat, and starts them at 0: mean pooling.
  std::vector<ParamSpec> params(const HeadShape& s) const override {
    if (!learned_summaries_) return {};
    return {{.name = "indexer_q", .shape = {s.n_kv_head * s.head_dim}, .decay = false}};
  }

  double* alpha() override { return &alpha_; }
  double* gamma() override { return &gamma_; }

  void record(Tape& tape, const AttentionInput& in, Var o) const override {
    const Kernels<Device::cpu> kernels;
    const DashRouting routing = routing_;
    const Var q = in.q, k = in.k, v = in.v;
    const Var summary = learned_summaries_ ? in.params.at(0) : Var{};
    const int64_t B = q.value[0], Hq = q.value[1], N = q.value[2], D = q.value[3];
    const int64_t Hkv = k.value[1], M = (N + routing.chunk - 1) / routing.chunk;

    const Tensor kbar = tape.keep({B, Hkv, M, D}, DType::f64);
    const Tensor tau = tape.keep({B, Hq, N}, DType::f64);
    const Tensor lse = tape.keep({B, Hq, N});
    const Shape per_chunk{B, Hkv, N, M};
    const Var bias = router_learns_ ? tape.var(per_chunk) : Var{tape.keep(per_chunk), {}};
    const BlockSet blocks{.block = routing.chunk,
                          .mask = tape.keep({B, Hkv, N, (M + 63) / 64}, DType::u64),
                          .bias = bias.value};

    Tensor dkbar, route_scratch;
    if (tape.training()) {
      dkbar = tape.scratch(kbar.shape, DType::f64);
      route_scratch = tape.scratch({kernels.dash_route_backward_scratch(q.value.shape, kbar.shape)},
                                   DType::f64);
    }
    tape.record(
        "routing", bias.value, q.grad,
        [=, read = in.read, entropy = in.entropy] {
          kernels.dash_summaries(k.value, summary.value, routing.chunk, kbar);
          kernels.dash_route(q.value, kbar, routing, tau, blocks, {}, read);
          if (entropy) kernels.dash_entropy(q.value, kbar, routing, tau, entropy);
        },
        [=] {  // adds to what attention left in q's and k's gradients
          if (!bias.grad) return;
          kernels.dash_route_backward(q.value, kbar, routing, tau, bias.grad, q.grad, dkbar,
                                      route_scratch);
          kernels.dash_summaries_backward(k.value, summary.value, routing.chunk, dkbar, k.grad,
                                          summary.grad);
        },
        {k.grad, summary.grad});

    const Tensor keys = tape.scratch(k.value.shape);
    Tensor token_scratch;
    if (tape.training()) {
      token_scratch =
          tape.scratch({kernels.attention_backward_scratch(q.value.shape, k.value.shape)});
    }
    tape.record(
        "attention", o.value, q.grad,
        [=, read = in.read] {
          kernels.attention(q.value, k.value, v.value, blocks, o.value, lse, keys, read);
        },
        [=] {
          kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, blocks,
                                     q.grad, k.grad, v.grad, bias.grad, token_scratch);
        },
        {k.grad, v.grad, bias.grad});
  }

 private:
  double alpha_, gamma_;
  bool learned_summaries_, router_learns_;
  DashRouting routing_;
};

}  // namespace

std::unique_ptr<AttentionMethod> make_dash_attention(const AttentionConfig& config) {
  return std::make_unique<DashAttention>(config);
}

}  // namespace entrain
