#pragma once
// A training step on a small model and text, in this process.
#include "tests/train/tiny_run.h"
#include "train/train_step.h"

namespace entrain {

struct TinyStep {
  explicit TinyStep(const std::string& method, bool recompute = false, Device device = Device::cpu,
                    DType dtype = DType::f32)
      : config(config_of(method, recompute)),
        store(written(dir / "tokens.h5")),
        sampler(store, config.data.seq_len, 1),
        decoder(config.model, config.attention, config.data.seq_len, 1, true, device, dtype),
        comm(make_comm()),
        memory(device) {
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      memory.rewind();
      step.emplace(config, decoder, memory, *comm);
    }
  }

  const StepResult& run(int64_t number) {
    return step->run(number, (number - 1) * config.train.global_batch, sampler);
  }

  TempDir dir;
  RunConfig config;
  TokenStore store;
  Sampler sampler;
  Decoder decoder;
  std::unique_ptr<Comm> comm;
  TapeMemory memory;
  std::optional<TrainStep> step;

 private:
  static RunConfig config_of(const std::string& method, bool recompute) {
    RunConfig c;
    c.model = {.n_layer = 2,
               .d_model = 16,
               .n_head = 10,
               .n_kv_head = 2,
               .head_dim = 10,
               .d_ff = 20,
               .vocab = Tokenizer().vocab()};
    c.attention = {
        .method = method, .chunk = 16, .block = 16, .topk = 3, .l = 8, .d = 4, .window = 20};
    c.data.seq_len = 100;
    c.train.steps = 100;
    c.train.global_batch = 20;
    c.train.micro_batch = 10;
    c.train.optim.lr = 3e-3;
    c.train.recompute = recompute;
    return c;
  }
  static std::string written(const std::string& path) {
    write_store(path);
    return path;
  }
};

}  // namespace entrain
