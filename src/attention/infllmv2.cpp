// InfLLM-V2 (arXiv 2509.24663): mean-pooled windows of keys are scored by softmax, and each query
// attends the blocks under the best of them, topk in all. It adds no parameters, and no gradient
// passes through the choice.
#include "attention/record_attention.h"
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

  /// Pooled windows.
  std::vector<CacheSpec> cache(const HeadShape& s, int64_t tokens, DType) const override {
    return {{{1, s.n_kv_head, selection_.windows(tokens), s.head_dim}, DType::f64}};
  }

  Tensor record(Tape& tape, const AttentionInput& in, Var o) const override {
    const BlockSelection selection = selection_;
    const Var q = in.q, k = in.k;
    const int64_t B = q.value[0], N = q.value[2], D = q.value[3];
    const int64_t Hkv = k.value[1], M = (k.value[2] + selection.block - 1) / selection.block;
    const Queries queries = in.queries();
    const Runs windows = selection.runs();

    const BlockSet blocks{.block = selection.block,
                          .mask = tape.keep({B, Hkv, N, (M + 63) / 64}, DType::u64),
                          .bias = {}};

    const Tensor pooled = queries.decoding()
                              ? in.cache.at(0)
                              : tape.scratch({B, Hkv, selection.windows(N), D}, DType::f64);
    Tensor scratch;
    if (!queries.decoding()) {
      const int64_t elements = with_kernels(
          tape.device(), [&](auto kernels) { return kernels.select_scratch(pooled.shape); });
      scratch = tape.scratch({elements}, DType::f64);
    }
    tape.record("selection", {}, {}, [=, read = in.read](auto kernels) {
      const auto [begin, count, tokens] = queries.complete(k.value, windows);
      kernels.pool_runs(tokens, windows, pooled.slice(2, begin, count));
      kernels.select_blocks(q.value, queries.seen(pooled, windows), selection,
                            queries.attend(blocks), scratch, read);
    });

    record_attention(tape, in, blocks, {}, o);
    return blocks.mask;
  }

 private:
  BlockSelection selection_;
};

}  // namespace

std::unique_ptr<AttentionMethod> make_infllmv2_attention(const AttentionConfig& config) {
  return std::make_unique<InfLlmV2Attention>(config);
}

}  // namespace entrain
