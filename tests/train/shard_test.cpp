// Runs whose optimizer is sharded over ranks.
#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

const std::string sharded = "train.shard_optimizer=true ";

class Sharded : public TinyRun {};

TEST_F(Sharded, TrainsAsWithoutShards) {
  for (const int count : {0, 1, 2, 3}) {
    const std::string whole = fmt::format("whole{}", count), parts = fmt::format("parts{}", count);
    train(whole, "attention.method=dash", count);
    train(parts, "attention.method=dash " + sharded, count);
    expect_same_steps(dir / parts, dir / whole);
    expect_same_checkpoints(checkpoint(parts, 12), checkpoint(whole, 12));
  }
}

TEST_F(Sharded, TurnsOnAndOffOnResume) {
  train("whole", "", 2);
  for (const bool first : {false, true}) {
    const std::string name = fmt::format("run{}", first);
    const auto shard = [](bool on) { return fmt::format(" train.shard_optimizer={}", on); };
    train(name, "checkpoint.every=6" + shard(first), 2);
    std::filesystem::remove(checkpoint(name, 12));
    train(name, "--resume" + shard(!first), 2);
    expect_same_steps(dir / name, dir / "whole");
    expect_same_checkpoints(checkpoint(name, 12), checkpoint("whole", 12));
  }
}

TEST_F(Sharded, GoesOnWithAnotherNumberOfRanks) {
  train("whole");
  train("run", sharded + "train.steps=12 checkpoint.every=4", 3);
  std::filesystem::remove(checkpoint("run", 12));
  std::filesystem::remove(checkpoint("run", 8));
  train("run", sharded + "checkpoint.every=4 --resume", 2);
  std::filesystem::remove(checkpoint("run", 12));
  train("run", sharded + "--resume");  // alone
  expect_near_steps(dir / "run", dir / "whole");
}

}  // namespace
}  // namespace entrain
