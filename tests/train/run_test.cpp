// Whole runs of `entrain train`: what must not change them, and what they measure.
#include <cmath>

#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

const std::string dash = "attention.method=dash ";
// Chunks small enough that the target is above routing's floor.
const std::string sparse = dash + "attention.chunk=2 attention.target_density=0.4 ";
// AdamW and the search for gamma amplify rounding from the fourth step on: density may then differ
// by percents where sums are taken in another order.
const std::string sparse_start = sparse + "train.steps=3 ";

class Training : public TinyRun {
 protected:
  double last_loss(const std::string& name) { return read_steps(dir / name).back()["loss"]; }
};

TEST_F(Training, Learns) {
  train("run", "train.steps=60 train.lr=1.0e-2");
  const std::vector<Json> steps = read_steps(dir / "run");
  ASSERT_EQ(steps.size(), 60u);
  EXPECT_NEAR(steps.front()["loss"], std::log(257), 0.1);
  EXPECT_LT(steps.back()["loss"], 2.5);
  const Json last = read_metrics(dir / "run").back();
  EXPECT_EQ(last["step"], 60);
  EXPECT_NEAR(last["eval_loss"], double(steps.back()["loss"]), 0.3);
  EXPECT_NEAR(last["eval_perplexity"], std::exp(double(last["eval_loss"])), 1e-9);
  EXPECT_EQ(files_in(dir / "run"),
            (std::vector<std::string>{"checkpoints", "config.yaml", "metrics.jsonl"}));
}

TEST_F(Training, HasTheSameLossesOnAnyNumberOfRanks) {
  for (const std::string& method : {std::string(), dash, sparse_start}) {
    train("alone", method);
    for (const int count : {1, 2, 3}) {
      const std::string name = fmt::format("ranks{}", count);
      train(name, method, count);
      if (count == 1) expect_same_steps(dir / name, dir / "alone");
      expect_near_steps(dir / name, dir / "alone");
      EXPECT_EQ(read_info(checkpoint(name, method == sparse_start ? 3 : 12)).ranks, count);
      std::filesystem::remove_all(dir / name);
    }
    std::filesystem::remove_all(dir / "alone");
  }
}

TEST_F(Training, RepeatsBitwiseOnTwoRanks) {
  train("first", sparse, 2);
  train("second", sparse, 2);
  expect_same_steps(dir / "first", dir / "second");
  expect_same_checkpoints(checkpoint("first", 12), checkpoint("second", 12));
}

TEST_F(Training, RecomputesBitwiseTheSame) {
  for (const std::string& method : {std::string(), dash}) {
    train("kept", method);
    train("recomputed", method + "train.recompute=true");
    expect_same_steps(dir / "recomputed", dir / "kept");
    expect_same_checkpoints(checkpoint("recomputed", 12), checkpoint("kept", 12));
    for (const char* name : {"kept", "recomputed"}) std::filesystem::remove_all(dir / name);
  }
}

TEST_F(Training, CountsItsOperations) {
  const auto for_a_token = [&](const std::string& arguments, int count) {
    train("run", "train.steps=2 " + arguments, count);
    const Json last = read_steps(dir / "run").back();
    std::filesystem::remove_all(dir / "run");
    return double(last["flops_per_second"]) / double(last["tokens_per_second"]);
  };
  const double d = 32, D = 8, Hq = 4, Hkv = 2, ff = 48, L = 2, V = 257, N = 64;
  const double weights = L * d * (2 * (Hq + Hkv) * D + 3 * ff) + V * d;
  const double pairs = (N + 1) / 2;
  for (const int count : {0, 2}) {
    EXPECT_NEAR(for_a_token("", count) / (6 * weights + 12 * D * Hq * L * pairs), 1, 1e-9);
    EXPECT_NEAR(for_a_token("train.recompute=true", count) / for_a_token("", count), 1, 1e-9);
  }
  // Three branches of which two read every pair; compressed entries are also scored for selection.
  const double windows = [] {
    double sum = 0;
    for (int i = 0; i < 64; ++i) sum += i < 7 ? 0 : (i - 7) / 4 + 1;
    return sum / 64;
  }();
  const double projections = L * d * (4 * Hkv * D + 3 * Hq);
  EXPECT_NEAR(
      for_a_token("attention.method=nsa attention.block=16 attention.topk=4 attention.l=8 "
                  "attention.d=4 attention.window=64 attention.compression=mean",
                  0) /
          (6 * (weights + projections) + D * Hq * L * (12 * (2 * pairs + windows) + 2 * windows)),
      1, 1e-9);
}

TEST_F(Training, AccumulatesToTheSameLosses) {
  train("one", sparse_start + "train.global_batch=4 train.micro_batch=1");
  train("two", sparse_start + "train.global_batch=4 train.micro_batch=2");
  train("four", sparse_start + "train.global_batch=4 train.micro_batch=4");
  expect_near_steps(dir / "two", dir / "one");
  expect_near_steps(dir / "four", dir / "one");
}

TEST_F(Training, DiffersWithTheSeed) {
  train("one", "train.seed=1");
  train("two", "train.seed=2");
  EXPECT_NE(last_loss("one"), last_loss("two"));
}

TEST_F(Training, TiesEmbeddings) {
  train("run", "model.tie_embeddings=true train.steps=60 train.lr=1.0e-2");
  EXPECT_LT(last_loss("run"), 2.5);
  for (const auto& parameter : read_info(checkpoint("run", 60)).parameters) {
    EXPECT_EQ(parameter.name.find("lm_head"), std::string::npos);
  }
  EXPECT_NEAR(evaluate(dir / "run")["loss"], read_metrics(dir / "run").back()["eval_loss"], 1e-6);
}

TEST_F(Training, FollowsTheSchedule) {
  const auto rates = [&](const std::string& schedule) {
    train(schedule,
          "train.steps=10 train.warmup=4 train.lr=1.0e-3 train.min_lr=1.0e-4 train.schedule=" +
              schedule);
    std::vector<double> rates;
    for (const Json& step : read_steps(dir / schedule)) rates.push_back(step["lr"]);
    return rates;
  };
  const std::vector<double> constant = rates("constant"), linear = rates("linear"),
                            cosine = rates("cosine");
  ASSERT_EQ(cosine.size(), 10u);
  for (size_t step = 1; step <= 10; ++step) {
    const double rising = 1e-3 * static_cast<double>(step) / 4;
    const double done = std::max(0.0, (static_cast<double>(step) - 4) / 6);
    const bool warm = step >= 4;
    const double falling = (1 + std::cos(3.14159265358979 * done)) / 2;
    EXPECT_NEAR(constant[step - 1], warm ? 1e-3 : rising, 1e-12) << step;
    EXPECT_NEAR(linear[step - 1], warm ? 1e-3 - 9e-4 * done : rising, 1e-12) << step;
    EXPECT_NEAR(cosine[step - 1], warm ? 1e-4 + 9e-4 * falling : rising, 1e-12) << step;
  }
}

TEST_F(Training, KeepsTheNewestCheckpoints) {
  train("run", "checkpoint.every=3 checkpoint.keep=2 train.steps=11");
  EXPECT_EQ(files_in(dir / "run/checkpoints"),
            (std::vector<std::string>{"step_00000009.h5", "step_00000011.h5"}));
}

TEST_F(Training, EvaluatesOnTheWay) {
  train("run", "eval.every=5");
  std::vector<int> evaluated;
  for (const Json& line : read_metrics(dir / "run")) {
    if (line.contains("eval_loss")) evaluated.push_back(line["step"]);
  }
  EXPECT_EQ(evaluated, (std::vector<int>{5, 10, 12}));
  // Looking changes nothing.
  train("unseen");
  expect_same_steps(dir / "run", dir / "unseen");
}

TEST_F(Training, TakesBlocksLongerThanTheSequence) {
  for (const char* method : {"dash", "infllmv2", "nsa"}) {
    train(method, fmt::format("train.steps=1 attention.method={} attention.chunk=2000000000 "
                              "attention.block=2000000000",
                              method));
  }
}

TEST_F(Training, ReachesTheTargetDensity) {
  train("run", sparse + "train.steps=250 train.global_batch=2 train.log_every=50");
  const std::vector<Json> steps = read_steps(dir / "run");
  double mean = 0;
  for (size_t i = steps.size() - 50; i < steps.size(); ++i)
    mean += double(steps[i]["density"]) / 50;
  EXPECT_NEAR(mean, 0.4, 0.08);

  // Evaluation takes gamma from the checkpoint and leaves it alone.
  const double gamma = read_info(checkpoint("run", 250)).state.controller.at("gamma");
  EXPECT_NE(gamma, 1);
  const Json frozen = evaluate(dir / "run");
  EXPECT_EQ(frozen["density"],
            evaluate(fmt::format("{} attention.gamma={}", dir / "run", gamma))["density"]);
  EXPECT_NEAR(frozen["density"], 0.4, 0.08);
  EXPECT_GT(
      double(evaluate(fmt::format("{} attention.gamma={}", dir / "run", gamma / 10))["density"]),
      double(frozen["density"]));
}

TEST_F(Training, FollowsItsSchedulesAlsoWhenResumed) {
  const std::string scheduled =
      dash +
      "attention.chunk=4 attention.alpha_start=1.25 attention.alpha_steps=8 "
      "attention.gamma_start=2 attention.gamma=10 attention.gamma_steps=4 ";
  train("run", scheduled);
  const std::vector<Json> steps = read_steps(dir / "run");
  for (const int64_t step : {1, 5, 9, 12}) {
    const Json& line = steps[static_cast<size_t>(step - 1)];
    EXPECT_DOUBLE_EQ(line["alpha"], step > 8 ? 1.5 : 1.25 + 0.25 * double(step - 1) / 8);
    EXPECT_DOUBLE_EQ(line["gamma"], step > 4 ? 10 : 2 + 8 * double(step - 1) / 4);
  }
  train("twice", scheduled + "train.steps=3 train.schedule=constant");
  train("whole", scheduled + "train.schedule=constant");
  train("twice", scheduled + "--resume train.schedule=constant");
  expect_same_steps(dir / "twice", dir / "whole");

  // Evaluation takes alpha as the checkpoint left it.
  train("early", scheduled + "train.steps=3");
  const Json eval = evaluate(dir / "early");
  EXPECT_EQ(eval["density"],
            evaluate((dir / "early") + " attention.alpha=1.3125 attention.gamma=6")["density"]);
  EXPECT_NE(eval["density"], evaluate((dir / "early") + " attention.alpha=2")["density"]);
  ASSERT_TRUE(eval.contains("routing"));
  EXPECT_GT(double(eval["routing_entropy"]), 0);
  EXPECT_LT(double(eval["routing"].back()["entropy"]),
            double(eval["routing"].back()["softmax_entropy"]));
}

// A learning rate so small that nothing moves shows what a run starts from.
const std::string frozen = "train.steps=1 train.lr=1.0e-30 ";

TEST_F(Training, StartsFromTheParametersOfAnotherMethod) {
  train("donor", "train.steps=40 train.lr=1.0e-2");
  const Ended ended = run(alone(train_line(
      "run", frozen + dash + "attention.gamma=1.0e-6 train.init_from=" + (dir / "donor"))));
  ASSERT_EQ(ended.code, 0) << ended.err;
  const h5::File donor = h5::File::open(checkpoint("donor", 40));
  const h5::File heir = h5::File::open(checkpoint("run", 1));
  size_t fresh = 0;
  for (const std::string& name : heir.datasets("parameters")) {
    const std::string path = "parameters/" + name;
    if (!donor.has(path)) {
      ++fresh;
      EXPECT_NE(ended.out.find(name), std::string::npos) << ended.out;
      continue;
    }
    EXPECT_EQ(heir.read(path).bytes, donor.read(path).bytes) << name;
  }
  EXPECT_GT(fresh, 0u);
  EXPECT_EQ(heir.datasets("parameters").size(), donor.datasets("parameters").size() + fresh);
  EXPECT_NE(ended.out.find("starting from " + checkpoint("donor", 40)), std::string::npos);
  EXPECT_NE(
      ended.out.find(fmt::format("parameters taken: {} ", donor.datasets("parameters").size())),
      std::string::npos)
      << ended.out;
  EXPECT_NE(ended.out.find(fmt::format("new, started fresh: {} ", fresh)), std::string::npos)
      << ended.out;
  // With gamma near 0 every chunk is attended, and the prior tilts nothing.
  EXPECT_NEAR(read_metrics(dir / "run").back()["eval_loss"], evaluate(dir / "donor")["loss"], 1e-4);
}

TEST_F(Training, StartsFromACheckpointAndBackAcrossMethods) {
  train("donor", dash + "train.steps=2 checkpoint.every=1");
  const Ended ended =
      run(alone(train_line("run", frozen + "train.init_from=" + checkpoint("donor", 1))));
  ASSERT_EQ(ended.code, 0) << ended.err;
  EXPECT_NE(ended.out.find("not used by this model"), std::string::npos) << ended.out;
  const h5::File donor = h5::File::open(checkpoint("donor", 1));
  const h5::File heir = h5::File::open(checkpoint("run", 1));
  for (const std::string& name : heir.datasets("parameters")) {
    EXPECT_EQ(heir.read("parameters/" + name).bytes, donor.read("parameters/" + name).bytes)
        << name;
  }
  EXPECT_EQ(read_info(checkpoint("run", 1)).state.step, 1);
}

TEST_F(Training, SeeksDensityFromTheGammaItStartsFrom) {
  train("donor", sparse + frozen);
  const double gamma = read_info(checkpoint("donor", 1)).state.controller.at("gamma");
  const auto start = [&](const std::string& name, const std::string& arguments) {
    const Ended ended = run(alone(train_line(
        name, frozen + arguments + " attention.gamma=900 train.init_from=" + (dir / "donor"))));
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.out;
  };
  // The parameters being the donor's, its gamma reads the target.
  const std::string seeking = start("seeking", sparse);
  EXPECT_NE(seeking.find(fmt::format("gamma: {:.4g} as there", gamma)), std::string::npos)
      << seeking;
  EXPECT_EQ(read_steps(dir / "seeking")[0]["gamma"], gamma);
  const std::string fixed = start("fixed", dash + "attention.chunk=2");
  EXPECT_NE(fixed.find(fmt::format("gamma: 900 as configured ({:.4g} there)", gamma)),
            std::string::npos)
      << fixed;
  EXPECT_EQ(read_steps(dir / "fixed")[0]["gamma"], 900);
}

TEST_F(Training, SkipsWhatAnotherRunHasSeen) {
  // With weights that stay, a step's loss tells its sequences.
  const std::string still = "train.lr=1.0e-30 train.global_batch=4 train.schedule=constant ";
  train("whole", still + "train.steps=7");
  train("rest", still + "train.steps=4 data.skip=12 checkpoint.every=2");
  const std::vector<Json> whole = read_steps(dir / "whole");
  const auto expect_the_rest = [&] {
    const std::vector<Json> rest = read_steps(dir / "rest");
    ASSERT_EQ(rest.size(), 4u);
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(rest[i]["loss"], whole[i + 3]["loss"], 1e-6);
      EXPECT_EQ(rest[i]["tokens"], whole[i]["tokens"]) << "its own only";
    }
  };
  expect_the_rest();
  EXPECT_NE(whole[0]["loss"], whole[3]["loss"]);
  EXPECT_EQ(read_info(checkpoint("rest", 4)).state.sequences, 12 + 4 * 4);
  std::filesystem::remove(checkpoint("rest", 4));
  train("rest", still + "train.steps=4 data.skip=12 --resume");
  expect_the_rest();
  expect_refusal(run(alone(train_line("rest", still + "train.steps=9 data.skip=8 --resume"))), 2,
                 {checkpoint("rest", 4), "data.skip 12, not 8"});
}

TEST_F(Training, RefusesWhatItCannotStartFrom) {
  train("donor", "train.steps=1");
  const auto start = [&](const std::string& arguments) {
    return run(alone(train_line("run", arguments)));
  };
  expect_refusal(start("model.d_ff=64 train.init_from=" + (dir / "donor")), 1,
                 {"mlp", "[48, 32]", "[64, 32]", checkpoint("donor", 1)});
  expect_refusal(start("train.init_from=" + (dir / "none")), 1, {dir / "none"});
  std::filesystem::create_directories(dir / "empty");
  expect_refusal(start("train.init_from=" + (dir / "empty")), 1, {dir / "empty", "no checkpoint"});
  EXPECT_EQ(files_in(dir / "run"), std::vector<std::string>{});
}

TEST_F(Training, WritesPlainLinesIntoFiles) {
  for (const int count : {0, 1, 2}) {
    const std::string line = train_line(fmt::format("run{}", count));
    const Ended ended = run("export TERM=xterm; " + (count ? ranks(count, line) : alone(line)));
    ASSERT_EQ(ended.code, 0) << ended.err;
    ASSERT_EQ(ended.out.find_first_of("\r\x1b"), std::string::npos) << ended.out;
    for (int step = 1; step <= 12; ++step) {
      ASSERT_NE(ended.out.find(fmt::format("\nstep {:2}/12  loss ", step)), std::string::npos)
          << ended.out;
    }
    EXPECT_NE(ended.out.find("MiB predicted"), std::string::npos);
    EXPECT_NE(ended.out.find("peak memory"), std::string::npos);
    EXPECT_EQ(ended.out.find("\ndone: "), ended.out.rfind("done: ") - 1) << "said by one rank";
  }
}

TEST_F(Training, ShowsALiveLineOnATerminal) {
  for (const int count : {0, 2}) {
    const std::string line = train_line(fmt::format("run{}", count), "train.steps=3");
    const std::string shown = shown_on_terminal(count ? ranks(count, line) : alone(line));
    for (const int step : {1, 3}) {
      ASSERT_NE(shown.find(fmt::format("\r\x1b[Kstep {}/3  loss ", step)), std::string::npos)
          << shown;
    }
    EXPECT_NE(shown.find("\ndone: 3 steps"), std::string::npos) << shown;
  }
}

// A script between mpirun and the program has the program's output, not mpirun's.
TEST_F(Training, SeesMpirunsOutputThroughAScript) {
  const std::string line = fmt::format("bash -c '{}; true'", train_line("run"));
  const Ended ended = run(ranks(2, line));
  ASSERT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(ended.out.find_first_of("\r\x1b"), std::string::npos) << ended.out;
}

}  // namespace
}  // namespace entrain
