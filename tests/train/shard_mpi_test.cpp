// Training steps with a sharded optimizer: the same as without, to the bit, on the device of the
// ranks.
#include <gtest/gtest.h>

#include "tests/mpi_main.h"
#include "tests/temp_dir.h"
#include "tests/train/tiny_store.h"
#include "train/device.h"
#include "train/moments.h"
#include "train/train_step.h"

namespace entrain {
namespace {

RunConfig config_of(const std::string& method, bool sharded) {
  RunConfig c;
  c.model = {.n_layer = 2,
             .d_model = 64,
             .n_head = 2,
             .n_kv_head = 1,
             .head_dim = 64,
             .d_ff = 96,
             .vocab = Tokenizer().vocab()};
  c.attention = {.method = method, .chunk = 16};
  c.data.seq_len = 128;
  c.train.steps = 6;
  c.train.global_batch = 12;
  c.train.micro_batch = 2;
  c.train.optim.clip = 0.1;  // below the norms
  c.train.shard_optimizer = sharded;
  return c;
}

struct Trained {
  std::vector<double> losses, norms;
  std::vector<float> values, m, v;  // moments on rank 0
  size_t bytes = 0;
};

std::vector<float> floats(const Tensor& t) {
  Mirror mirror(t);
  mirror.download();
  const float* begin = mirror.host().ptr<float>();
  return {begin, begin + mirror.host().numel()};
}

Trained train(const TokenStore& store, const RunConfig& config) {
  Sampler sampler(store, config.data.seq_len, 1);
  const Device device = world().device();
  const Shard shard =
      config.train.shard_optimizer ? Shard{world().rank(), world().size()} : Shard{};
  Decoder decoder(config.model, config.attention, config.data.seq_len, 1, true, device,
                  choose_dtype("auto", device), shard);
  TapeMemory memory(device);
  std::optional<TrainStep> step;
  for (const bool committed : {false, true}) {
    if (committed) memory.commit();
    memory.rewind();
    step.emplace(config, decoder, memory, world());
  }
  Trained trained;
  for (int number = 1; number <= config.train.steps; ++number) {
    const StepResult& result = step->run(number, (number - 1) * config.train.global_batch, sampler);
    trained.losses.push_back(result.loss);
    trained.norms.push_back(result.grad_norm);
    if (world().size() > 1) {
      EXPECT_GT(result.waiting_seconds, 0);
    }
  }
  const Moments moments = gather_moments(decoder.params(), world());
  trained.values = floats(decoder.params().values());
  trained.bytes = decoder.params().bytes();
  if (world().rank() > 0) return trained;
  trained.m = floats(moments.m);
  trained.v = floats(moments.v);
  return trained;
}

TEST(ShardedStep, IsThatOfTheWholeToTheBit) {
  TempDir dir;
  write_store(dir / "tokens.h5");
  const TokenStore store(dir / "tokens.h5");
  for (const char* method : {"full", "dash"}) {
    const Trained whole = train(store, config_of(method, false));
    const Trained sharded = train(store, config_of(method, true));
    EXPECT_EQ(sharded.losses, whole.losses) << method;
    EXPECT_EQ(sharded.norms, whole.norms) << method;
    EXPECT_EQ(sharded.values, whole.values) << method;
    EXPECT_EQ(sharded.m, whole.m) << method;
    EXPECT_EQ(sharded.v, whole.v) << method;
    EXPECT_LT(whole.losses.back(), whole.losses.front());
    if (world().size() > 1) {
      EXPECT_LT(sharded.bytes, whole.bytes * 4 / 5);
    }
  }
}

}  // namespace
}  // namespace entrain
