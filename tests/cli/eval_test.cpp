// entrain eval and entrain info, on what a run leaves behind.
#include <cmath>

#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

class Eval : public TinyRun {
 protected:
  Eval() {
    train("run", "attention.method=dash attention.gamma=20 train.steps=8 checkpoint.every=4");
  }

  static Ended info(const std::string& arguments) { return run_entrain("info " + arguments); }
};

TEST_F(Eval, SaysInJsonWhatTheRunSaid) {
  const Json eval = evaluate(dir / "run");
  EXPECT_EQ(eval["method"], "dash");
  EXPECT_EQ(eval["step"], 8);
  EXPECT_EQ(eval["tokens"], 4 * 64);
  EXPECT_GT(double(eval["tokens_per_second"]), 0);
  EXPECT_NEAR(eval["perplexity"], std::exp(double(eval["loss"])), 1e-9);
  const Json last = read_metrics(dir / "run").back();
  EXPECT_EQ(eval["loss"], last["eval_loss"]);
  EXPECT_EQ(eval["density"], last["density"]);
  EXPECT_EQ(eval["router_density"], last["router_density"]);
  EXPECT_GT(double(eval["active_blocks"]), 1);
  ASSERT_EQ(eval["layers"].size(), 2u);
  double mean = 0;
  for (const Json& layer : eval["layers"]) {
    ASSERT_EQ(layer.size(), 2u) << "key-value heads";
    for (const Json& head : layer) mean += double(head["density"]) / 4;
  }
  EXPECT_NEAR(mean, eval["density"], 1e-9);
}

TEST_F(Eval, GivesTheLossByPosition) {
  const Json eval = evaluate(dir / "run");
  ASSERT_EQ(eval["loss_by_position"].size(), 16u);
  double mean = 0;
  int64_t at = 0;
  for (const Json& stretch : eval["loss_by_position"]) {
    EXPECT_EQ(stretch["begin"], at);
    at = stretch["end"];
    mean += double(stretch["loss"]) / 16;
  }
  EXPECT_EQ(at, 64);
  EXPECT_NEAR(mean, eval["loss"], 1e-12);
}

TEST_F(Eval, TakesAnotherAttention) {
  train("sparse",
        "attention.method=dash attention.chunk=2 attention.target_density=0.4 train.steps=2");
  const Json full = evaluate((dir / "sparse") + " attention.method=full");
  EXPECT_EQ(full["method"], "full");
  EXPECT_EQ(full["density"], 1.0);
  // With every chunk forced, DashAttention is full attention on the same parameters.
  const Json all = evaluate((dir / "sparse") + " attention.local_blocks=1000");
  EXPECT_NEAR(all["loss"], full["loss"], 1e-6);
  const Json nsa = evaluate((dir / "run") + " attention.method=nsa attention.local_blocks=1");
  EXPECT_LT(double(nsa["loss"]), 8);
  const Ended text =
      run(alone(fmt::format("{} eval {} attention.method=nsa", ENTRAIN_BINARY, dir / "run")));
  EXPECT_NE(text.out.find("self_attn.compress_k.pos"), std::string::npos) << text.out;
}

TEST_F(Eval, GivesTheRecallOfMarkedAnswers) {
  EXPECT_FALSE(evaluate(dir / "run").contains("recall_accuracy"));
  ASSERT_EQ(run_entrain("tokenize --synthetic recall --length 64 --distance 20 --pairs 3 "
                        "--documents 30 --validation 0.3 --out " +
                        (dir / "recall.h5"))
                .code,
            0);
  train("recall", fmt::format("data.path={} train.steps=4 eval.every=4", dir / "recall.h5"));
  const Json eval = evaluate(dir / "recall"), two = evaluate(dir / "recall", 2);
  EXPECT_EQ(eval["answers"], 4 * 3);
  const double accuracy = eval["recall_accuracy"];
  EXPECT_GE(accuracy, 0);
  EXPECT_LT(accuracy, 1);
  EXPECT_EQ(two["answers"], eval["answers"]);
  EXPECT_EQ(two["recall_accuracy"], accuracy);
  EXPECT_EQ(read_metrics(dir / "recall").back()["recall_accuracy"], accuracy);
  const Ended text = run(alone(fmt::format("{} eval {}", ENTRAIN_BINARY, dir / "recall")));
  EXPECT_NE(text.out.find(fmt::format("recall accuracy {:.4f} of 12 answers", accuracy)),
            std::string::npos)
      << text.out;
  EXPECT_NE(info(dir / "recall.h5").out.find(" answers\n"), std::string::npos);
}

TEST_F(Eval, AgreesOnTwoRanks) {
  Json alone = evaluate(dir / "run"), together = evaluate(dir / "run", 2);
  EXPECT_NEAR(alone["loss"], together["loss"], 1e-12);
  EXPECT_EQ(alone["density"], together["density"]);
  EXPECT_EQ(alone["layers"], together["layers"]);
  EXPECT_EQ(alone["tokens"], together["tokens"]);
}

TEST_F(Eval, TakesOverridesAndCheckpoints) {
  EXPECT_EQ(evaluate(checkpoint("run", 4))["step"], 4);
  EXPECT_EQ(evaluate((dir / "run") + " eval.sequences=2")["tokens"], 2 * 64);
  const Ended text = run(alone(fmt::format("{} eval {}", ENTRAIN_BINARY, dir / "run")));
  EXPECT_EQ(text.code, 0);
  EXPECT_NE(text.out.find("perplexity"), std::string::npos) << text.out;
}

TEST_F(Eval, LooksPastADamagedCheckpointWithoutSpoilingTheJson) {
  const std::string bytes = read_file(checkpoint("run", 8));
  write_file(checkpoint("run", 8), bytes.substr(0, bytes.size() / 2));
  EXPECT_EQ(evaluate(dir / "run")["step"], 4);
  EXPECT_EQ(evaluate(dir / "run", 2)["step"], 4);
}

TEST_F(Eval, RefusesInOneLine) {
  for (const int count : {0, 2}) {
    const auto eval = [&](const std::string& arguments) {
      const std::string line = fmt::format("{} eval {}", ENTRAIN_BINARY, arguments);
      return run(count ? ranks(count, line) : alone(line));
    };
    expect_refusal(eval(dir / "none"), 1, {dir / "none"});
    expect_refusal(eval((dir / "run") + " attention.target_density=0.5"), 2,
                   {"set attention.gamma"});
    expect_refusal(eval(dir / "tokens.h5"), 1, {dir / "tokens.h5", "not a checkpoint"});
    expect_refusal(eval((dir / "run") + " data.seq_len=5000"), 1, {dir / "tokens.h5"});
  }
}

TEST_F(Eval, InfoDescribesStoresCheckpointsAndRuns) {
  const Ended store = info(dir / "tokens.h5");
  EXPECT_EQ(store.code, 0) << store.err;
  EXPECT_NE(store.out.find("token store, checksums match"), std::string::npos) << store.out;
  EXPECT_NE(store.out.find("bytes, 257 ids"), std::string::npos) << store.out;
  const Ended file = info(checkpoint("run", 4)), folder = info(dir / "run");
  for (const auto& [shown, step] : {std::pair{file, 4}, {folder, 8}}) {
    EXPECT_EQ(shown.code, 0) << shown.err;
    EXPECT_NE(shown.out.find("checkpoint, checksums match"), std::string::npos) << shown.out;
    EXPECT_NE(shown.out.find(fmt::format("step {}, {} sequences, 1 rank", step, 6 * step)),
              std::string::npos)
        << shown.out;
    EXPECT_NE(shown.out.find("gamma 20"), std::string::npos) << shown.out;
    EXPECT_NE(shown.out.find("model.layers.1.mlp.down_proj.weight [32, 48]"), std::string::npos);
    EXPECT_NE(shown.out.find("method: dash"), std::string::npos);
  }
}

TEST_F(Eval, InfoRefusesWhatItDoesNotKnow) {
  write_file(dir / "text", "not HDF5");
  h5::File other = h5::File::create(dir / "other.h5");
  other.set("", "what", std::string("something else"));
  other.close();
  const std::string bytes = read_file(checkpoint("run", 4));
  write_file(checkpoint("run", 4), bytes.substr(0, bytes.size() / 2));
  std::filesystem::create_directories(dir / "empty");
  for (const std::string& path :
       {dir / "text", dir / "other.h5", dir / "none", dir / "empty", checkpoint("run", 4)}) {
    expect_refusal(info(path), 1, {path});
  }
}

}  // namespace
}  // namespace entrain
