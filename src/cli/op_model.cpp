// entrain op model: logits, loss and the gradient of every parameter.
#include <algorithm>

#include "cli/op.h"
#include "kernels/kernels.h"
#include "model/decoder.h"

namespace entrain::cli {
/// A small decoder whose parameters are inputs under their Hugging Face names.
void run_model(Case& c) {
  auto whole = [&](const char* name) { return static_cast<int>(c.required(name)); };
  auto whole_or = [&](const char* name, int otherwise) {
    return static_cast<int>(c.parameter(name, otherwise));
  };
  const std::string method = c.text("method");
  const bool selects = method == "nsa" || method == "infllmv2";
  const int l = whole_or("l", 32);
  const AttentionConfig attention{.method = method,
                                  .chunk = whole_or("chunk", 64),
                                  .alpha = c.parameter("alpha", 1.5),
                                  .gamma = c.parameter("gamma", 1),
                                  .sigma = c.parameter("sigma", 1e6),
                                  .prior_eps = c.parameter("prior_eps", 0),
                                  .center = c.parameter("center", 1) != 0,
                                  .init_blocks = whole_or("init_blocks", selects ? 1 : 0),
                                  .local_blocks = whole_or("local_blocks", selects ? 2 : 1),
                                  .block = whole_or("block", 64),
                                  .topk = whole_or("topk", 16),
                                  .l = l,
                                  // The attribute d is the model's width; windows overlap by half.
                                  .d = whole_or("stride", (l + 1) / 2),
                                  .window = whole_or("window", 512)};
  require(attention.chunk > 0 && attention.block > 0 && attention.topk > 0 && attention.l > 0 &&
              attention.d > 0 && attention.window > 0 && attention.init_blocks >= 0 &&
              attention.local_blocks >= 0,
          "{}: chunk, block, topk, l, stride and window must be positive, init_blocks and "
          "local_blocks not negative",
          c.where());
  require(attention.alpha >= 1 && attention.alpha <= 2 && attention.sigma > 0 &&
              attention.prior_eps >= 0,
          "{}: alpha must be in [1, 2], sigma positive and prior_eps not negative", c.where());
  const ModelConfig model{.n_layer = whole("L"),
                          .d_model = whole("d"),
                          .n_head = whole("Hq"),
                          .n_kv_head = whole("Hkv"),
                          .head_dim = whole("D"),
                          .d_ff = whole("ff"),
                          .vocab = whole("V"),
                          .rope_theta = c.parameter("theta", 10000),
                          .norm_eps = c.parameter("eps", 1e-5),
                          .tie_embeddings = !c.has("lm_head.weight")};
  const int sizes[] = {model.n_layer,  model.d_model, model.n_head, model.n_kv_head,
                       model.head_dim, model.d_ff,    model.vocab};
  require(*std::ranges::min_element(sizes) > 0 && model.n_head % model.n_kv_head == 0 &&
              model.head_dim % 2 == 0,
          "{}: L, d, Hq, Hkv, D, ff and V must be positive, Hq a multiple of Hkv and D even",
          c.where());
  const Tensor tokens = c.input("tokens", DType::i32, 2),
               targets = c.input("targets", DType::i32, 2);
  require(tokens.shape == targets.shape, "{}: tokens {} and targets {} differ in shape", c.where(),
          tokens.shape.to_string(), targets.shape.to_string());
  for (const Tensor& t : {tokens, targets}) {
    const int32_t* ids = c.host(t).ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      require(ids[i] >= 0 && ids[i] < model.vocab, "{}: token id {} is beyond the vocabulary of {}",
              c.where(), ids[i], model.vocab);
    }
  }
  Decoder decoder(model, attention, tokens[1], 0, true, c.device, c.real);
  for (const Param& p : decoder.params().all()) {
    const Tensor value = c.input(p.name, c.sum_type(), p.value.shape.rank);
    require(value.shape == p.value.shape, "{}: in/{} is {}, not {}", c.where(), p.name,
            value.shape.to_string(), p.value.shape.to_string());
    copy(value, p.value);
  }
  decoder.params().round();

  const int64_t T = tokens.numel();
  Tensor loss, logits;
  auto run = [&](Tape::Options options, auto build) {
    TapeMemory memory(c.device);
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      Tape tape(memory, options);
      build(tape);
      if (!committed) continue;
      tape.forward();
      if (options.training) tape.backward();
      if (logits) copy(logits, c.result("out/logits", {tokens[0], tokens[1], model.vocab}));
      if (!loss) continue;
      const Tensor sum = c.make({1}, DType::f64);
      with_kernels(c.device, [&](auto kernels) { kernels.add_sum(loss, sum); });
      c.host_result("out/loss", {1}, DType::f64).ptr<double>()[0] =
          *c.host(sum).ptr<double>() / static_cast<double>(T);
    }
  };
  run({.dtype = c.real}, [&](Tape& tape) { logits = decoder.logits(tape, tokens); });
  logits = {};
  run({.dtype = c.real, .training = true},
      [&](Tape& tape) { loss = decoder.loss(tape, tokens, targets, 1 / static_cast<double>(T)); });
  for (const Param& p : decoder.params().all()) {
    copy(p.grad, c.result("grad/" + p.name, p.value.shape, c.sum_type()));
  }
}

}  // namespace entrain::cli
