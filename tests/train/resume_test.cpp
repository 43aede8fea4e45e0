// Runs that are stopped, killed or damaged, and go on.
#include <map>
#include <random>

#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

using Names = std::vector<std::string>;

const std::string sparse = "attention.method=dash attention.chunk=2 attention.target_density=0.4 ";

class Resume : public TinyRun {
 protected:
  /// A run of `steps` without interruption, to compare with.
  void reference(const std::string& arguments, int64_t steps, int count = 0) {
    train("reference", arguments, count);
    last = steps;
  }
  void expect_as_reference(const std::string& name) {
    expect_same_steps(dir / name, dir / "reference");
    expect_same_checkpoints(checkpoint(name, last), checkpoint("reference", last));
    const std::vector<Json> a = read_metrics(dir / name), b = read_metrics(dir / "reference");
    ASSERT_EQ(a.size(), b.size()) << "evaluations included";
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].value("eval_loss", 0.0), b[i].value("eval_loss", 0.0));
    }
  }

  int64_t last = 0;
};

TEST_F(Resume, GoesOnBitwiseAfterASignal) {
  const std::string steps = sparse + "train.steps=80 train.global_batch=4 eval.every=30 ";
  reference(steps, 80);
  for (const auto& [name, number] :
       {std::pair{"term", SIGTERM}, {"int", SIGINT}, {"usr1", SIGUSR1}}) {
    Program first(alone(train_line(name, steps)));
    ASSERT_TRUE(wait_for_steps(name, 5));
    first.signal(number);
    const Ended stopped = first.wait();
    ASSERT_EQ(stopped.code, 3) << stopped.err;
    EXPECT_EQ(stopped.err, "");
    const auto done = static_cast<int64_t>(read_steps(dir / name).size());
    ASSERT_LT(done, last);
    EXPECT_NE(stopped.out.find(fmt::format("stopped by a signal after step {}", done)),
              std::string::npos)
        << stopped.out;
    EXPECT_EQ(files_in(dir / name + "/checkpoints"), Names{fmt::format("step_{:08}.h5", done)});

    const Ended resumed = run(alone(train_line(name, steps + "--resume")));
    ASSERT_EQ(resumed.code, 0) << resumed.err;
    EXPECT_NE(
        resumed.out.find(fmt::format("resumed from {} (step {})", checkpoint(name, done), done)),
        std::string::npos)
        << resumed.out;
    expect_as_reference(name);
  }
}

TEST_F(Resume, GoesOnBitwiseAfterMpirunPassesOnASignal) {
  const std::string steps = sparse + "train.steps=150 train.global_batch=4 ";
  reference(steps, 150, 2);
  Program first(ranks(2, train_line("run", steps)));
  ASSERT_TRUE(wait_for_steps("run", 5));
  first.signal(SIGUSR1);
  const Ended stopped = first.wait();
  EXPECT_EQ(stopped.code, 3) << stopped.err;
  EXPECT_EQ(stopped.errors(), Names{});
  const auto done = static_cast<int64_t>(read_steps(dir / "run").size());
  ASSERT_LT(done, last);
  EXPECT_EQ(files_in(dir / "run/checkpoints"), Names{fmt::format("step_{:08}.h5", done)});
  train("run", steps + "--resume", 2);
  expect_as_reference("run");
}

// On these mpirun ends its ranks, but leaves them time to save.
TEST_F(Resume, SavesWhenMpirunEnds) {
  for (const auto& [name, number] : {std::pair{"term", SIGTERM}, {"int", SIGINT}}) {
    Program program(ranks(2, train_line(name, "train.steps=1000000 train.log_every=100000")));
    ASSERT_TRUE(wait_for_steps(name, 5));
    program.signal(number);
    const Ended stopped = program.wait();
    EXPECT_NE(stopped.code, 0);
    EXPECT_EQ(stopped.errors(), Names{});
    EXPECT_NE(stopped.out.find("stopped by a signal after step"), std::string::npos) << stopped.out;
    const auto done = static_cast<int64_t>(read_steps(dir / name).size());
    EXPECT_EQ(newest_valid(dir / name + "/checkpoints"), checkpoint(name, done));
  }
}

TEST_F(Resume, EndsAtOnceOnASecondSignal) {
  // The first signal waits for the step to end, which here takes long.
  Program program(alone(train_line("run",
                                   "train.steps=5 train.global_batch=100000 "
                                   "checkpoint.every=1")));
  for (int i = 0; i < 10000 && !std::filesystem::exists(dir / "run/metrics.jsonl"); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  program.signal(SIGTERM);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  program.signal(SIGTERM);
  EXPECT_EQ(program.wait().code, 128 + SIGTERM);
  EXPECT_EQ(files_in(dir / "run/checkpoints"), Names{});
}

TEST_F(Resume, GoesOnBitwiseAfterBeingKilledAtAnyMoment) {
  const std::string steps =
      sparse + "train.steps=60 train.global_batch=2 checkpoint.every=1 checkpoint.keep=2 ";
  reference(steps, 60);
  std::random_device entropy;
  Rng rng(entropy(), 0);
  int kills = 0;
  for (bool complete = false; !complete && kills < 20;) {
    Program program(alone(train_line("run", steps + "--resume")));
    const auto done = static_cast<int64_t>(
        std::filesystem::exists(dir / "run/metrics.jsonl") ? read_steps(dir / "run").size() : 0);
    wait_for_steps("run", std::min(done + 2, last));
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(30000)));
    program.kill_all();
    const Ended ended = program.wait();
    complete = ended.code == 0;
    ASSERT_TRUE(complete || ended.code == 128 + SIGKILL) << ended.err;
    kills += !complete;
    EXPECT_EQ(ended.out.find("skipping"), std::string::npos) << "a damaged file under a final name";
  }
  EXPECT_GE(kills, 3);
  train("run", steps + "--resume");
  expect_as_reference("run");
  EXPECT_EQ(files_in(dir / "run/checkpoints"), (Names{"step_00000059.h5", "step_00000060.h5"}));
}

TEST_F(Resume, GoesOnBitwiseAfterTwoRanksAreKilled) {
  const std::string steps = sparse + "train.steps=60 train.global_batch=2 checkpoint.every=1 ";
  reference(steps, 60, 2);
  std::random_device entropy;
  Rng rng(entropy(), 0);
  for (int64_t target : {4, 16, 28}) {
    Program program(ranks(2, train_line("run", steps + "--resume")));
    ASSERT_TRUE(wait_for_steps("run", target));
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(20000)));
    program.kill_all();
    EXPECT_NE(program.wait().code, 0);
  }
  train("run", steps + "--resume", 2);
  expect_as_reference("run");
}

TEST_F(Resume, LosingOneRankEndsTheJob) {
  const std::string steps = "train.steps=100000 train.global_batch=2 checkpoint.every=5 ";
  Program program(ranks(2, train_line("run", steps)));
  ASSERT_TRUE(wait_for_steps("run", 12));
  const std::vector<pid_t> ranks = program.descendants();
  ASSERT_GE(ranks.size(), 2u);
  ::kill(ranks.back(), SIGKILL);
  EXPECT_NE(program.wait().code, 0);
  const auto newest = newest_valid(dir / "run/checkpoints");
  ASSERT_TRUE(newest.has_value());
  EXPECT_GE(read_info(*newest).state.step, 10);
}

TEST_F(Resume, SaysThatAnotherNumberOfRanksIsNotBitwise) {
  reference("", 12);
  train("run", "train.steps=12 checkpoint.every=6", 2);
  std::filesystem::remove(checkpoint("run", 12));
  const Ended resumed = run(ranks(3, train_line("run", "--resume")));
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_NE(resumed.out.find("saved by 2 ranks and resumed by 3"), std::string::npos)
      << resumed.out;
  expect_near_steps(dir / "run", dir / "reference");
}

TEST_F(Resume, StartsWhereThereIsNothingAndEndsWhereAllIsDone) {
  train("run", "--resume");
  const auto folder = [&] {
    std::map<std::string, std::pair<std::string, std::filesystem::file_time_type>> files;
    for (const char* name : {"config.yaml", "metrics.jsonl", "checkpoints/step_00000012.h5"}) {
      const std::string path = dir / "run/" + name;
      files[name] = {read_file(path), std::filesystem::last_write_time(path)};
    }
    return files;
  };
  const auto before = folder();
  for (const std::string steps : {"12", "6"}) {  // fewer than are done, too
    const Ended again =
        run(alone(train_line("run", "--resume train.lr=1.0e-3 train.steps=" + steps)));
    EXPECT_EQ(again.code, 0);
    EXPECT_NE(again.out.find("is complete: 12 of " + steps + " steps"), std::string::npos)
        << again.out;
    EXPECT_TRUE(folder() == before);
  }
  train("run", "--resume train.steps=14");
  EXPECT_EQ(read_steps(dir / "run").size(), 14u);
}

TEST_F(Resume, MustBeAskedFor) {
  train("run");
  const std::string metrics = read_file(dir / "run/metrics.jsonl");
  expect_refusal(run(alone(train_line("run"))), 2, {dir / "run", "--resume", "run.dir"});
  expect_refusal(run(ranks(2, train_line("run"))), 2, {dir / "run", "--resume", "run.dir"});
  EXPECT_EQ(read_file(dir / "run/metrics.jsonl"), metrics);
}

void truncate(const std::string& path) {
  const std::string bytes = read_file(path);
  write_file(path, bytes.substr(0, bytes.size() * 2 / 3));
}

void flip_a_bit(const std::string& path, const std::string& dataset) {
  const auto at = static_cast<size_t>(h5::File::open(path).placed(dataset).offset);
  std::string bytes = read_file(path);
  bytes[at + 2] ^= 0x10;
  write_file(path, bytes);
}

class Damage : public Resume {
 protected:
  Damage() { reference("checkpoint.every=4", 12); }
};

TEST_F(Damage, FallsBackToAnOlderCheckpoint) {
  for (const int count : {0, 2}) {
    const std::string name = fmt::format("run{}", count);
    train(name, "checkpoint.every=4", count);
    truncate(checkpoint(name, 12));
    flip_a_bit(checkpoint(name, 8), "parameters/model.norm.weight");
    const std::string line = train_line(name, "checkpoint.every=4 --resume");
    const Ended resumed = run(count ? ranks(count, line) : alone(line));
    ASSERT_EQ(resumed.code, 0) << resumed.err;
    EXPECT_NE(resumed.out.find("resumed from " + checkpoint(name, 4)), std::string::npos)
        << resumed.out;
    for (const int64_t step : {12, 8}) {  // said once, beside the errors
      const std::string path = checkpoint(name, step);
      const size_t at = resumed.err.find(path);
      EXPECT_NE(at, std::string::npos) << resumed.err;
      EXPECT_EQ(resumed.err.find(path, at + path.size()), std::string::npos) << resumed.err;
    }
    if (count == 0) expect_as_reference(name);
    expect_near_steps(dir / name, dir / "reference");
  }
}

TEST_F(Damage, RefusesWhenAllCheckpointsAreDamaged) {
  for (const int64_t step : {4, 8, 12}) truncate(checkpoint("reference", step));
  const std::string metrics = read_file(dir / "reference/metrics.jsonl");
  const Ended ended = run(alone(train_line("reference", "--resume")));
  EXPECT_EQ(ended.code, 1);
  ASSERT_FALSE(ended.errors().empty());
  EXPECT_NE(ended.errors().back().find("all checkpoints in " + (dir / "reference/checkpoints")),
            std::string::npos)
      << ended.err;
  EXPECT_EQ(read_file(dir / "reference/metrics.jsonl"), metrics);
}

TEST_F(Damage, RefusesDamagedTokens) {
  const std::string whole = read_file(dir / "tokens.h5");
  const auto expect_refused = [&](const std::string& part) {
    for (const int count : {0, 2}) {
      const std::string line = train_line("run");
      expect_refusal(run(count ? ranks(count, line) : alone(line)), 1, {dir / "tokens.h5", part});
    }
    expect_refusal(run(alone(fmt::format("{} eval {}", ENTRAIN_BINARY, dir / "reference"))), 1,
                   {dir / "tokens.h5", part});
    EXPECT_FALSE(std::filesystem::exists(dir / "run"));
  };
  truncate(dir / "tokens.h5");
  expect_refused("truncated");
  write_file(dir / "tokens.h5", whole);
  flip_a_bit(dir / "tokens.h5", "train/tokens");
  expect_refused("");
  std::filesystem::remove(dir / "tokens.h5");
  expect_refused("");
}

TEST_F(Damage, RefusesOtherTokens) {
  write_store(dir / "other.h5", 2);
  expect_refusal(run(alone(train_line("reference",
                                      "--resume train.steps=20 data.path=" + (dir / "other.h5")))),
                 1, {checkpoint("reference", 12), dir / "other.h5", "other data"});
}

TEST_F(Damage, RefusesACheckpointOfAnotherShape) {
  for (const int count : {0, 2}) {
    const std::string line = train_line("reference", "--resume train.steps=20 model.d_ff=64");
    expect_refusal(run(count ? ranks(count, line) : alone(line)), 1,
                   {checkpoint("reference", 12), "[48, 32]", "[64, 32]"});
  }
  expect_refusal(run(alone(train_line("reference", "--resume train.steps=20 model.n_layer=3"))), 1,
                 {checkpoint("reference", 12), "layers.2"});
  EXPECT_EQ(read_steps(dir / "reference").size(), 12u);
}

TEST_F(Damage, RefusesAnotherSeed) {
  expect_refusal(run(alone(train_line("reference", "--resume train.steps=20 train.seed=2"))), 1,
                 {"train.seed 1"});
}

}  // namespace
}  // namespace entrain
