#pragma once
// Every kernel, declared once. A backend defines the members for its device in files that mirror
// each other: cpu/NAME.cpp for Kernels<Device::cpu>, cuda/NAME.cu for Kernels<Device::cuda>, whose
// work runs in order on the stream of the process. Kernels know tensors and nothing of models.
//
// Types. "Real" tensors (activations, their gradients, matrices) are f32 or f64 on the CPU, f32 or
// bf16 on the GPU. With bf16, sums (gradients of parameters, lse, rstd, loss, biases of blocks)
// and parameters of one dimension (norms, gates, summary queries) are f32: "sum type".
//
// Conventions. Activations and their gradients are overwritten; gradients of parameters are added
// to (names end in _sum). Matrices are row-major. B batch, N tokens of a sequence, T = B N tokens,
// Hq query heads, Hkv key-value heads, g = Hq / Hkv, D head_dim, M = ceil(N / block) blocks. q is
// [B, Hq, N, D], k and v are [B, Hkv, N, D], as strided views whose last stride is 1. While
// decoding, the N queries are the tokens from BlockSet::first on and k and v hold first + N.
#include "core/tensor.h"

namespace entrain {

/// Runs of tokens: run m is tokens [m stride, m stride + length). Single tokens by default.
struct Runs {
  int64_t length = 1;
  int64_t stride = 1;

  /// Runs that lie whole within so many tokens.
  int64_t within(int64_t tokens) const {
    return tokens < length ? 0 : (tokens - length) / stride + 1;
  }
  /// The first token at which run m is complete.
  int64_t end(int64_t m) const { return m * stride + length - 1; }
};

/// Which blocks of keys each query attends, besides causality, and with what bias on their logits.
struct BlockSet {
  int64_t block = 64;  // keys in a block
  Tensor mask = {};    // u64 [B, Hkv, N, ceil(M / 64)], bit c: block c; empty: every block
  Tensor bias = {};    // f32 [B, Hkv, N, M]; empty: 0
  int64_t window = 0;  // > 0: only the last `window` keys up to the query, exactly
  Runs keys = {};      // what a key stands for; a query sees it once it is complete
  int64_t first = 0;   // the token that the first query is; mask and bias may then be wider
};

/// How the heads of a group come to one distribution over chunks, w.
enum class Aggregation : uint8_t {
  entmax,  // w = mean of entmax(gamma z^h) over the heads: DashAttention
  softmax  // w = entmax(gamma mean of softmax(z^h)): an ablation, softmax spreads before entmax
           // cuts
};

/// DashAttention's router (arXiv 2605.18753, stages 0 and 1). z^h = q^h . kbar / sqrt(D).
struct DashRouting {
  int64_t chunk = 64;
  double sigma = 1e6;
  double prior_eps = 0;
  bool center = true;
  int64_t init_blocks = 0;
  int64_t local_blocks = 1;
  Aggregation aggregation = Aggregation::entmax;
  // {alpha, gamma} on the host, read when the kernel runs (by the GPU: pinned): a controller or a
  // schedule moves them.
  const double* alpha_gamma = nullptr;

  double alpha() const { return alpha_gamma[0]; }
  double gamma() const { return alpha_gamma[1]; }
};

/// What is known of routing at a position, summed over layers, batch and kv heads: f64 [N,
/// entropy_fields].
enum EntropyField : uint8_t {
  entropy_queries,     // those with candidates
  entropy_candidates,  // chunks to choose from
  entropy_routing,     // nats: of the routing weights w
  entropy_softmax,     // nats: of the mean over the group of softmax(gamma z^h), on the same scores
  entropy_fields
};

/// How the weights of windows become the score of a block.
enum class BlockScore : uint8_t {
  best,  // InfLLM-V2: the largest weight of the windows that overlap it
  sum    // NSA: each window counts once for each of its strides that ends in the block
};

/// Blocks chosen by how much a query attends windows of keys (NSA, arXiv 2502.11089; InfLLM-V2,
/// arXiv 2509.24663). Window m is tokens [m stride, m stride + length); queries see it once it is
/// complete.
struct BlockSelection {
  int64_t block = 64;
  int64_t topk = 16;  // blocks of a query, forced ones included
  int64_t init_blocks = 1;
  int64_t local_blocks = 2;
  int64_t length = 32;
  int64_t stride = 16;
  BlockScore score = BlockScore::best;

  Runs runs() const { return {length, stride}; }
  /// Windows complete within a number of tokens.
  int64_t windows(int64_t tokens) const { return runs().within(tokens); }
};

/// What attention read, per kv head, added to on every forward: f64 [Hkv, read_fields].
enum ReadField : uint8_t {
  read_pairs,    // query-key pairs attended
  read_router,   // entries the router read (summaries, windows)
  read_causal,   // query-key pairs a causal query could attend
  read_blocks,   // blocks attended, summed over queries
  read_queries,  // queries
  read_flops,    // operations of products forward + backward in training, of every branch and
                 // router; not what backward computes again
  read_fields
};

/// What AdamW is told besides tensors. c1 and c2 are the bias corrections 1 - beta^t; lr, c1 and c2
/// change from step to step: f64 [3] on the host, read when the kernel runs (by the GPU: pinned).
struct AdamW {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.1;
  double clip = 0;  // 0: no clipping
  const double* lr_c1_c2 = nullptr;
};

template <Device>
struct Kernels {
  /// to = from, two views [B, H, N, D] whose last stride is 1
  void copy_rows(Tensor from, Tensor to) const;
  /// y = a + b
  void add(Tensor a, Tensor b, Tensor y) const;

  /// y[t] = w[tokens[t]]; tokens i32 [T], w [V, d], y [T, d]
  void embedding(Tensor tokens, Tensor w, Tensor y) const;
  void embedding_backward(Tensor tokens, Tensor dy, Tensor dw_sum) const;

  /// y = x w^T, or y = base + x w^T; x [T, in], w [out, in], y and base (or empty) [T, out]
  void linear(Tensor x, Tensor w, Tensor y, Tensor base = {}) const;
  void linear_backward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw_sum) const;

  /// y = x rsqrt(mean(x^2) + eps) w over the last dimension; rstd [T] is kept for the backward
  /// pass.
  void rmsnorm(Tensor x, Tensor w, double eps, Tensor y, Tensor rstd) const;
  /// Adds to dx: the input of a norm is the residual stream.
  void rmsnorm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor dx_sum,
                        Tensor dw_sum) const;

  /// Rotates x [B, H, N, D] in place by position, halves of a head paired (Hugging Face's Llama).
  /// cos_sin f32 [N, D]: cosines, then sines. The inverse rotates gradients back.
  void rope(Tensor x, Tensor cos_sin, bool inverse) const;

  /// y = silu(gate) up; gate_up [T, 2 f] holds gate, then up
  void swiglu(Tensor gate_up, Tensor y) const;
  void swiglu_backward(Tensor dy, Tensor gate_up, Tensor dgate_up) const;

  /// Cross-entropy of logits x w^T without holding them all: loss [T] in nats and, unless dx is
  /// empty, the gradients of scale * sum(loss). predicted i32 [T] (or empty) gets the id of the
  /// largest logit, the lowest of equal ones. logits: scratch [rows, V], rows at a time.
  void head_loss(Tensor x, Tensor w, Tensor targets, double scale, Tensor loss, Tensor predicted,
                 Tensor dx, Tensor dw_sum, Tensor logits) const;

  /// Causal softmax attention over `blocks`; lse f32 [B, Hq, N] is the log of the row sums.
  /// Rows that attend nothing give 0. read: see ReadField, or empty. scratch: u8
  /// [attention_scratch()], for all keys at once; empty: only what is attended is prepared, for
  /// each tile of queries anew. Where keys stand for runs of tokens, k and v are [B, Hkv,
  /// blocks.keys.within(first + N), D]. only_flops: the rest is counted elsewhere.
  void attention(Tensor q, Tensor k, Tensor v, const BlockSet& blocks, Tensor o, Tensor lse,
                 Tensor scratch, Tensor read, bool only_flops = false) const;
  static int64_t attention_scratch(Tensor q, Tensor k);
  /// dbias [B, Hkv, N, M] (or empty) gets the sums of dS over a block's tokens and the group's
  /// heads: 0 for blocks that were not attended. scratch: u8 [attention_backward_scratch()].
  /// add_dq: queries that attend several sets of keys sum their gradients.
  void attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor dout, Tensor lse,
                          const BlockSet& blocks, Tensor dq, Tensor dk, Tensor dv, Tensor dbias,
                          Tensor scratch, bool add_dq = false) const;
  static int64_t attention_backward_scratch(Tensor q, Tensor k);

  /// Summaries of complete chunks, zeros for others: kbar [B, Hkv, M, D], a view, f64, or f32 where
  /// k is bf16, as while decoding; s f32 [Hkv, D], or empty for means.
  void dash_summaries(Tensor k, Tensor s, int64_t chunk, Tensor kbar) const;
  void dash_summaries_backward(Tensor k, Tensor s, int64_t chunk, Tensor dkbar, Tensor dk_sum,
                               Tensor ds_sum) const;
  /// Routing: tau f64 [B, Hq, N] the entmax thresholds of (alpha - 1) gamma z, or for alpha = 1 of
  /// gamma z the logs of the softmax's sums, 0 without candidates; blocks.mask and blocks.bias as
  /// attention takes them, weights f32 [B, Hkv, N, M] (or empty) the routing weights w. M is
  /// kbar's. scratch: f64 [dash_route_scratch()], or empty, as while decoding: each tile of queries
  /// then prepares summaries for itself, which may be f32, and those of chunks before the first
  /// query's may be read while the work before this still runs. beside: that work only makes
  /// summaries which no query here routes over, so q may be read then as well.
  void dash_route(Tensor q, Tensor kbar, const DashRouting& routing, Tensor tau,
                  const BlockSet& blocks, Tensor weights, Tensor scratch, Tensor read,
                  bool beside = false) const;
  static int64_t dash_route_scratch(const Shape& q, const Shape& kbar);
  /// From dbias back to the scores: adds to dq, writes dkbar f64 [B, Hkv, M, D]. tau and blocks as
  /// dash_route left them. dbias is 0 for candidates that were not routed; what it holds afterwards
  /// is of no use: it may be written over. scratch: f64 [dash_route_backward_scratch()].
  void dash_route_backward(Tensor q, Tensor kbar, const DashRouting& routing, Tensor tau,
                           const BlockSet& blocks, Tensor dbias, Tensor dq_sum, Tensor dkbar,
                           Tensor scratch) const;
  static int64_t dash_route_backward_scratch(const Shape& q, const Shape& kbar);
  /// Adds to entropy, see EntropyField; tau as dash_route left it.
  void dash_entropy(Tensor q, Tensor kbar, const DashRouting& routing, Tensor tau,
                    Tensor entropy) const;

  /// Means of the rows of x [B, H, N, D] over runs of tokens: pooled f64 or x's type
  /// [B, H, W, D], a view, W = runs.within(N).
  void pool_runs(Tensor x, Runs runs, Tensor pooled) const;
  /// Rows of runs side by side, plus offset [length D] (or empty): rows [B H W, length D].
  void unfold_runs(Tensor x, Runs runs, Tensor offset, Tensor rows) const;
  /// The way back of both: dx sums what each run hands its tokens, drows (or empty) theirs and
  /// dpooled [B, H, W, D] its share of the mean.
  void fold_runs(Tensor drows, Tensor dpooled, Runs runs, Tensor dx) const;
  /// sum [n] += the rows of x [rows, n]
  void add_rows(Tensor x, Tensor sum) const;

  /// blocks.mask as attention takes it: the forced blocks, then the best-scored, topk in all. A
  /// query's softmax over the keys of windows it sees, a view [B, Hkv, W, D] f64 or q's type,
  /// summed over the group's heads, weighs windows; selection.score says what a block makes of
  /// them. Equal scores go to the lower block. scratch: f64 [select_scratch()] where keys are f64,
  /// or empty, as while decoding: scores are then in double, always.
  void select_blocks(Tensor q, Tensor keys, const BlockSelection& selection, const BlockSet& blocks,
                     Tensor scratch, Tensor read) const;
  static int64_t select_scratch(const Shape& keys);
  /// Counts, as pairs, the last `window` tokens of each query that no block of its mask holds.
  void read_window(const BlockSet& blocks, int64_t window, Tensor read) const;

  /// gate = sigmoid(x + bias); x and gate [B, H, N, 1], bias [H]
  void gate(Tensor x, Tensor bias, Tensor gate) const;
  void gate_backward(Tensor dgate, Tensor gate, Tensor dx, Tensor dbias_sum) const;
  /// y = gate x, or y += gate x; gate [B, H, N, 1], x and y [B, H, N, D]
  void scale_rows(Tensor x, Tensor gate, bool add, Tensor y) const;
  void scale_rows_backward(Tensor dy, Tensor x, Tensor gate, Tensor dx, Tensor dgate) const;

  /// alpha-entmax over the first length[r] entries of each row of z [R, n], exact zeros elsewhere.
  void entmax(Tensor z, Tensor length, double alpha, Tensor p) const;
  void entmax_backward(Tensor p, Tensor dp, double alpha, Tensor dz) const;

  /// sum f64 [1] += the elements of x, in a fixed order
  void add_sum(Tensor x, Tensor sum) const;
  /// sum f64 [1] of squares, in an order that does not depend on the number of threads.
  void sum_of_squares(Tensor x, Tensor sum) const;
  /// One AdamW step over all parameters, flat (Loshchilov and Hutter 2019); clears g. decays u8: 1
  /// where weight decay applies. g is first scaled to the norm `clip` where its own, the root of
  /// squares f64 [1], is larger; where that is not finite, nothing changes. rounded bf16 (or
  /// empty) gets the new w.
  void adamw(Tensor w, Tensor g, Tensor m, Tensor v, Tensor decays, Tensor squares,
             const AdamW& adamw, Tensor rounded) const;
};

/// Calls f with the kernels of a device.
template <class F>
decltype(auto) with_kernels(Device device, F&& f) {
  return device == Device::cuda ? f(Kernels<Device::cuda>{}) : f(Kernels<Device::cpu>{});
}

}  // namespace entrain
