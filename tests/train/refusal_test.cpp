// What `entrain train` refuses, and runs that fail on the way: one line, and what was saved stays.
#include <cmath>
#include <limits>

#include "tests/train/tiny_run.h"
#include "train/config.h"

namespace entrain {
namespace {

class Refusal : public TinyRun {
 protected:
  /// Alone and on two ranks, leaving no run folder behind.
  void expect_refused(const std::string& arguments, int code,
                      const std::vector<std::string>& parts) {
    for (const int count : {0, 2}) {
      const std::string line = train_line("run", arguments);
      expect_refusal(run(count ? ranks(count, line) : alone(line)), code, parts);
      EXPECT_FALSE(std::filesystem::exists(dir / "run")) << arguments;
    }
  }
};

TEST_F(Refusal, UnknownKeysAndImpossibleValues) {
  expect_refused("train.learning_rate=1", 2, {"train.learning_rate", "did you mean train.lr?"});
  expect_refused("model.head_dim=7", 2, {"model.head_dim"});
}

TEST_F(Refusal, SequencesLongerThanTheData) {
  expect_refused("data.seq_len=1000000", 1, {dir / "tokens.h5", "1000000"});
}

TEST_F(Refusal, BatchesThatRanksCannotShare) {
  expect_refusal(run(ranks(2, train_line("run", "train.global_batch=3"))), 2,
                 {"train.global_batch is 3", "2 ranks", "2 or 4"});
  EXPECT_FALSE(std::filesystem::exists(dir / "run"));
}

TEST_F(Refusal, MoreMemoryThanThereIs) {
  // Beyond any address space.
  expect_refused("model.d_ff=2000000000 model.d_model=32000", 1,
                 {"out of memory", "GiB", "lower train.micro_batch"});
}

TEST_F(Refusal, AFolderThatCannotBeMade) {
  write_file(dir / "file", "");
  for (const int count : {0, 2}) {
    const std::string line = train_line("file/run");
    expect_refusal(run(count ? ranks(count, line) : alone(line)), 1,
                   {"cannot create folder " + (dir / "file/run")});
  }
}

TEST_F(Refusal, RanksWithDifferentConfigurations) {
  const std::string line =
      fmt::format("-np 1 {} : -np 2 {}", train_line("run"), train_line("run", "train.lr=0.25"));
  expect_refusal(run(environment() + "exec " MPIEXEC " " + line), 1,
                 {"rank 1 has another configuration than rank 0", "lr: 0.25", "lr: 0.003"});
  EXPECT_FALSE(std::filesystem::exists(dir / "run"));
}

TEST_F(Refusal, RanksOfWhichSomeResume) {
  const std::string line =
      fmt::format("-np 1 {} : -np 2 {}", train_line("run"), train_line("run", "--resume"));
  expect_refusal(run(environment() + "exec " MPIEXEC " " + line), 1,
                 {"rank 1 has another command line than rank 0: '--resume' instead of "
                  "'no --resume'"});
  EXPECT_FALSE(std::filesystem::exists(dir / "run"));
}

class Failure : public TinyRun {
 protected:
  void expect_intact(int64_t step) {
    EXPECT_NO_THROW(verify_checkpoint(checkpoint("run", step)));
    for (const std::string& name : files_in(dir / "run/checkpoints")) {
      EXPECT_NO_THROW(verify_checkpoint(dir / "run/checkpoints/" + name)) << name;
    }
  }
};

TEST_F(Failure, AnOverflowNamesStepAndOpAndKeepsTheLastCheckpoint) {
  for (const int count : {0, 2}) {
    std::filesystem::remove_all(dir / "run");
    const std::string line = train_line(
        "run", "train.lr=1.0e+30 train.clip=0 train.schedule=constant checkpoint.every=1");
    expect_refusal(run(count ? ranks(count, line) : alone(line)), 1,
                   {"step 2: ", "first op with a non-finite value is "});
    expect_intact(1);
    EXPECT_EQ(files_in(dir / "run/checkpoints").size(), 1u);
    EXPECT_EQ(read_steps(dir / "run").size(), 1u);
  }
}

TEST_F(Failure, AnOverflowBeforeAnyCheckpointStartsAnew) {
  const std::string overflow = "train.lr=1.0e+30 train.clip=0 train.schedule=constant ";
  expect_refusal(run(alone(train_line("run", overflow + "checkpoint.every=0"))), 1,
                 {"step 2: ", "--resume, which starts anew where there is no checkpoint"});
  EXPECT_EQ(files_in(dir / "run/checkpoints"), std::vector<std::string>{});
  train("run", "train.steps=2 --resume");
  EXPECT_EQ(read_steps(dir / "run").size(), 2u);
}

/// A copy of a checkpoint with one weight made infinite, its checksums in order.
void write_infinity(const std::string& from, const std::string& parameter, const std::string& to) {
  const CheckpointInfo info = read_info(from);
  std::vector<ParamSpec> specs;
  for (const auto& p : info.parameters) specs.push_back({p.name, p.shape});
  Params params(specs, 0, true, Device::cpu);
  load_checkpoint(from, params);
  params.get(parameter).value.ptr<float>()[3] = std::numeric_limits<float>::infinity();
  save_checkpoint(to, params, {params.m(), params.v()}, info.state, info.config_yaml,
                  info.data_fingerprint, info.ranks);
}

TEST_F(Failure, AnInfiniteWeightIsFoundWhereItIs) {
  train("donor", "train.steps=2");
  write_infinity(checkpoint("donor", 2), "model.layers.1.mlp.up_proj.weight", dir / "bad/donor.h5");
  for (const char* recompute : {"false", "true"}) {
    const Ended ended =
        run(alone(train_line("run", std::string("train.recompute=") + recompute +
                                        " train.init_from=" + (dir / "bad/donor.h5"))));
    expect_refusal(ended, 1, {"step 1: ", "is layers.1.", "(forward)"});
    EXPECT_EQ(files_in(dir / "run/checkpoints"), std::vector<std::string>{});
  }
}

// Files that may not grow past a limit fail as a full disk does.
std::string limited(int kilobytes, const std::string& line) {
  return fmt::format("trap '' XFSZ; ulimit -f {}; {}", kilobytes, line);
}

TEST_F(Failure, AFullDiskKeepsTheLastCheckpoint) {
  train("run", "train.steps=4 checkpoint.every=2 train.schedule=constant");
  const std::string older = read_file(checkpoint("run", 4));
  const std::string line =
      train_line("run", "train.steps=12 checkpoint.every=2 train.schedule=constant --resume");
  const int half = static_cast<int>(older.size() / 2048);
  expect_refusal(
      run(limited(half, alone(line))), 1,
      {"no checkpoint of step 6", "File too large", "earlier checkpoints are untouched"});
  expect_intact(4);
  EXPECT_EQ(read_file(checkpoint("run", 4)), older);
  EXPECT_EQ(files_in(dir / "run/checkpoints").size(), 2u) << "no part of another";
  EXPECT_EQ(run(alone(line)).code, 0);
  EXPECT_EQ(read_steps(dir / "run").size(), 12u);
}

TEST_F(Failure, AFullDiskEndsARunThatCannotWriteMetrics) {
  train("run", "train.steps=2 checkpoint.every=2 train.schedule=constant");
  const std::string line = train_line("run", "train.schedule=constant --resume");
  for (const int count : {0, 2}) {
    // Open MPI's own files are larger than 2 kB: only the program is limited.
    const std::string program = fmt::format("bash -c \"{}\"", limited(2, "exec " + line));
    expect_refusal(run(count ? ranks(count, program) : alone(program)), 1,
                   {"cannot write " + (dir / "run/metrics.jsonl")});
    expect_intact(2);
  }
  EXPECT_EQ(run(alone(line)).code, 0);
  EXPECT_EQ(read_steps(dir / "run").size(), 12u);
}

}  // namespace
}  // namespace entrain
