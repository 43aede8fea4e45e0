#include "core/tape.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "ops/ops.h"
#include "tests/expect_error.h"
#include "tests/tiny_decoder.h"

namespace entrain {
namespace {

Tape::Options recomputing(Tape::Options options) {
  options.recompute = true;
  return options;
}

TEST(Tape, RecomputationGivesTheSameBitsInLessMemory) {
  for (const char* method : {"full", "dash"}) {
    for (const DType real : {DType::f32, DType::f64}) {
      const Tape::Options options{.dtype = real, .training = true};
      TinyDecoder tiny(method, real);
      Graph kept(options, tiny.training());
      const std::vector<double> gradient = tiny.gradient(kept), losses = values(tiny.loss);
      Graph recomputed(recomputing(options), tiny.training());
      for (int pass = 0; pass < 2; ++pass) {
        EXPECT_EQ(tiny.gradient(recomputed), gradient) << method;
        EXPECT_EQ(values(tiny.loss), losses) << method;
      }
      EXPECT_LT(recomputed.memory().values.peak(), 0.7 * kept.memory().values.peak());
    }
  }
}

TEST(Tape, InferenceKeepsOneBlockAndGivesTheSameBits) {
  TinyDecoder tiny("dash");
  Graph training(training_f64, tiny.training());
  training->forward();
  const std::vector<double> losses = values(tiny.loss);
  Graph inference({.dtype = DType::f64}, tiny.training());
  inference->forward();
  EXPECT_EQ(values(tiny.loss), losses);
  EXPECT_EQ(inference.memory().grads.peak(), 0);
  EXPECT_LT(inference.memory().values.peak(), training.memory().values.peak());
}

TEST(Tape, ThePredictedMemoryIsWhatIsUsed) {
  for (const bool recompute : {false, true}) {
    TinyDecoder tiny("dash");
    Tape::Options options = training_f64;
    options.recompute = recompute;
    TapeMemory memory(Device::cpu);
    Tape counting(memory, options);
    tiny.training()(counting);
    const size_t predicted = memory.peak();
    memory.commit();
    for (int build = 0; build < 2; ++build) {  // rewound, the next tape fits the same memory
      Tape tape(memory, options);
      tiny.training()(tape);
      tape.forward();
      tape.backward();
      EXPECT_EQ(memory.peak(), predicted);
      memory.rewind();
    }
  }
}

TEST(Tape, GradientsOfBlocksShareMemory) {
  TinyDecoder tiny("full");
  const auto peak = [&](int blocks) {
    TapeMemory memory(Device::cpu);
    Tape tape(memory, training_f64);
    Pool pool;
    const Var w = pool.leaf({8, 8});
    Var x = tape.shared_var({4, 8});
    for (int i = 0; i < blocks; ++i) {
      x = tape.block("b", x, [&](Var in) {
        return ops::add_linear(tape, in, tape.var({4, 8}), w);
      });
    }
    return memory.grads.peak();
  };
  EXPECT_EQ(peak(5), peak(1));
}

TEST(Tape, ABlockEndsInTheResidualStream) {
  TapeMemory memory(Device::cpu);
  Tape tape(memory, training_f64);
  const Var x = tape.shared_var({4});
  EXPECT_ERROR(tape.block("layers.3", x, [&](Var) { return tape.var({4}); }),
               "block layers.3 does not end in the residual stream");
}

TEST(Tape, TimesItsOpsByName) {
  const auto wait = [] { std::this_thread::sleep_for(std::chrono::milliseconds(3)); };
  Graph graph({.training = true}, [&](Tape& tape) {
    tape.scope("part", [&] { tape.record("slow", {}, {}, wait, [=] { wait(), wait(); }); });
    tape.record("other", {}, {}, wait, wait);
  });
  graph->forward();
  EXPECT_EQ(graph->time("").forward, 0) << "nothing is timed unasked";
  graph->time_ops("");
  graph->forward();
  const double once = graph->time("part.").forward;
  EXPECT_GE(once, 0.003);
  EXPECT_EQ(graph->time("part.").backward, 0);
  EXPECT_GE(graph->time("").forward, once + 0.003);
  graph->backward();
  EXPECT_GE(graph->time("slow").backward, 0.006);
  EXPECT_EQ(graph->time("part.").forward, once);
  EXPECT_EQ(graph->time("part.slower").forward, 0);
  EXPECT_EQ(graph->times().at("slow").forward, once);
  EXPECT_EQ(graph->times().size(), 2u);
  graph->time_ops("part.");
  graph->forward();
  EXPECT_EQ(graph->time("other").forward, 0);
}

TEST(Tape, CallsBackWhenBackwardHasPassed) {
  TapeMemory memory(Device::cpu);
  Tape tape(memory, training_f64);
  std::string order;
  const auto op = [&](const char* name) {
    tape.record(
        name, {}, {}, [&order, name] { order += name; }, [&order, name] { order += name; });
  };
  op("a");
  tape.after_backward([&] { order += "!"; });
  op("b");
  op("c");
  tape.forward();
  EXPECT_EQ(order, "abc");
  order.clear();
  tape.backward();
  EXPECT_EQ(order, "cb!a");
}

struct Spoiled {
  const char* parameter;
  const char* op;
};

TEST(Tape, NamesTheOpThatAWeightSpoils) {
  const Spoiled cases[] = {
      {"model.embed_tokens.weight", "embedding (forward)"},
      {"model.layers.0.input_layernorm.weight", "layers.0.rmsnorm (forward)"},
      {"model.layers.1.self_attn.k_proj.weight", "layers.1.linear (forward)"},
      {"model.layers.1.mlp.down_proj.weight", "layers.1.add_linear (forward)"},
      {"model.norm.weight", "rmsnorm (forward)"},
      {"lm_head.weight", "head_loss (forward)"},
  };
  for (const double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    for (const bool recompute : {false, true}) {
      for (const Spoiled& c : cases) {
        TinyDecoder tiny("dash", DType::f32);
        Graph graph({.training = true, .recompute = recompute}, tiny.training());
        EXPECT_EQ(graph->first_non_finite(), "");
        fill(tiny.decoder.params().get(c.parameter).value, poison);
        EXPECT_EQ(graph->first_non_finite(), c.op) << c.parameter << " " << poison;
      }
    }
  }
}

TEST(Tape, NamesTheOpWhoseSummaryIsSpoiled) {
  TinyDecoder tiny("dash", DType::f32);
  Graph graph({.training = true}, tiny.training());
  put(tiny.decoder.params().get("model.layers.1.self_attn.indexer_q").value, 0, NAN);
  EXPECT_NE(graph->first_non_finite(), "");
}

// What was added to a gradient that is not finite is not finite either: each op looks at those of
// its weights.
TEST(Tape, NamesTheOpWhoseWeightGradientIsSpoiled) {
  const std::pair<const char*, const char*> ops[] = {{"embed_tokens", "embedding"},
                                                     {"lm_head", "head_loss"},
                                                     {"norm", "rmsnorm"},
                                                     {"indexer_q", "attention.routing"},
                                                     {"compress_", "attention.compression"},
                                                     {".bias", "attention.gate"},
                                                     {"o_proj", "add_linear"},
                                                     {"down_proj", "add_linear"},
                                                     {"proj", "linear"},
                                                     {"gate_", "linear"}};
  for (const char* method : {"full", "dash", "nsa"}) {
    for (const bool recompute : {false, true}) {
      TinyDecoder tiny(method, DType::f32);
      Graph graph({.training = true, .recompute = recompute}, tiny.training());
      EXPECT_EQ(graph->first_non_finite(), "");
      for (const Param& p : tiny.decoder.params().all()) {
        std::string expected = p.name.starts_with("model.layers.1.") ? "layers.1." : "";
        if (p.name.starts_with("model.layers.0.")) expected = "layers.0.";
        expected += std::ranges::find_if(ops, [&](const auto& x) {
                      return p.name.find(x.first) != std::string::npos;
                    })->second;
        put(p.grad, p.grad.numel() - 1, NAN);
        EXPECT_EQ(graph->first_non_finite(), expected + " (backward)") << method << p.name;
        fill(p.grad, 0);
      }
    }
  }
}

// Finite going up, beyond float going down: 1e-30 times 1e30 is 1, its gradient is 1e30.
TEST(Tape, NamesTheOpWhoseGradientOverflows) {
  Pool pool(DType::f32);
  const Var x = pool.leaf({1, 1}), down = pool.leaf({1, 1}), up = pool.leaf({1, 1});
  put(x.value, 0, 1e-30);
  put(down.value, 0, 1e30);
  put(up.value, 0, 1e30);
  double loss = 0;
  Graph graph({.training = true}, [&](Tape& tape) {
    probe(tape, pool, ops::linear(tape, ops::linear(tape, x, down), up), loss);
  });
  EXPECT_EQ(graph->first_non_finite(), "linear (backward)");
}

// The gradient of x is 1e30 times 1e-30, that of the weight 1e30 times 1e30.
TEST(Tape, NamesTheOpWhoseWeightGradientOverflows) {
  Pool pool(DType::f32);
  const Var x = pool.leaf({1, 1}), down = pool.leaf({1, 1}), up = pool.leaf({1, 1});
  put(x.value, 0, 1e30);
  put(down.value, 0, 1e-30);
  put(up.value, 0, 1e30);
  double loss = 0;
  Graph graph({.training = true}, [&](Tape& tape) {
    probe(tape, pool, ops::linear(tape, ops::linear(tape, x, down), up), loss);
  });
  EXPECT_EQ(graph->first_non_finite(), "linear (backward)");
}

}  // namespace
}  // namespace entrain
