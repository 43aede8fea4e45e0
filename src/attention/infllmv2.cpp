// InfLLM-V2 (arXiv 2509.24663): mean-pooled windows of keys are scored by softmax, and each query
// attends the blocks under the best of them, topk in all. It adds no parameters, and no gradient
// passes through the choice.
#include "attention/registry.h"

namespace entrain {
namespace {

class InfLlmV2Attention : public AttentionMethod {
 public:
  explicit InfLlmV2Attention(const AttentionConfig& c)
      : selection_{.block = c.block,
                   .topk = c.topk,
                   .init_blocks = c.init_blocks,
                   .local_blocks = c.local_blocks,
                   .length = c.l,
                   .stride = c.d} {}

  void record(Tape& tape, const AttentionInput& in, Var o) const override {
    const Kernels<Device::cpu> kernels;
    const BlockSelection selection = selection_;
    const Var q = in.q, k = in.k, v = in.v;
    const int64_t B = q.value[0], Hq = q.value[1], N = q.value[2], D = q.value[3];
    const int64_t Hkv = k.value[1], M = (N + selection.block - 1) / selection.block;

    const Tensor lse = tape.keep({B, Hq, N});
    const BlockSet blocks{.block = selection.block,
                          .mask = tape.keep({B, Hkv, N, (M + 63) / 64}, DType::u64),
                          .bias = {}};

    const Tensor pooled = tape.scratch({B, Hkv, selection.windows(N), D}, DType::f64);
    tape.record("selection", {}, {}, [=, read = in.read] {
      kernels.pool_runs(k.value, selection.runs(), pooled);
      kernels.select_blocks(q.value, pooled, selection, blocks.mask, read);
    });

    const Tensor keys = tape.scratch(k.value.shape);
    Tensor scratch;
    if (tape.training()) {
      scratch = tape.scratch({kernels.attention_backward_scratch(q.value.shape, k.value.shape)});
    }
    tape.record(
        "attention", o.value, q.grad,
        [=, read = in.read] {
          kernels.attention(q.value, k.value, v.value, blocks, o.value, lse, keys, read);
        },
        [=] {
          kernels.attention_backward(q.value, k.value, v.value, o.value, o.grad, lse, blocks,
                                     q.grad, k.grad, v.grad, {}, scratch);
        },
        {k.grad, v.grad});
  }

 private:
  BlockSelection selection_;
};

}  // namespace

std::unique_ptr<AttentionMethod> make_infllmv2_attention(const AttentionConfig& config) {
  return std::make_unique<InfLlmV2Attention>(config);
}

}  // namespace entrain
