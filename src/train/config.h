#pragma once
// A run's configuration: what a YAML file says, checked, with every key documented in one table.
#include <cstdint>
#include <string>
#include <vector>

#include "attention/config.h"
#include "core/error.h"
#include "model/config.h"
#include "optim/config.h"

namespace entrain {

struct DataConfig {
  std::string path;  // token store
  int seq_len = 0;
  int64_t skip = 0;  // sequences of the training stream to pass over

  bool operator==(const DataConfig&) const = default;
};

struct TrainConfig {
  int64_t steps = 0;
  int global_batch = 0;  // sequences an optimizer step sees, over all ranks
  int micro_batch = 0;   // sequences a rank holds at once, at most
  uint64_t seed = 1;
  std::string init_from;         // run folder or checkpoint whose parameters to start from
  bool recompute = false;        // recompute activations per block in the backward pass
  bool shard_optimizer = false;  // each rank keeps a part of the moments
  int log_every = 10;            // steps between console lines
  OptimConfig optim;

  bool operator==(const TrainConfig&) const = default;
};

struct CheckpointConfig {
  int64_t every = 500;  // steps; 0: only at the end and on signals
  int keep = 3;         // newest ones kept; 0: all

  bool operator==(const CheckpointConfig&) const = default;
};

struct EvalConfig {
  int64_t every = 250;  // steps; 0: only at the end
  int sequences = 64;   // of the validation split

  bool operator==(const EvalConfig&) const = default;
};

struct RunConfig {
  ModelConfig model;
  AttentionConfig attention;
  DataConfig data;
  TrainConfig train;
  CheckpointConfig checkpoint;
  EvalConfig eval;
  std::string dir;              // run.dir
  std::string device = "auto";  // run.device: auto | cpu | cuda
  std::string dtype = "auto";   // run.dtype, of activations: auto | f32 | bf16

  bool operator==(const RunConfig&) const = default;
};

/// What every function here throws: the user's configuration is at fault, not the program or
/// machine.
struct ConfigError : Error {
  explicit ConfigError(const std::string& message, std::string key = "")
      : Error(message), key(std::move(key)) {}
  std::string key;  // the key at fault, where check() found one
};

/// Reads YAML, applies overrides "section.key=value" (the last of several wins) and checks the
/// result. Errors name file (or `origin`), line and the nearest valid key for an unknown key, a
/// wrong type, a missing or impossible value.
RunConfig load_config(const std::string& path, const std::vector<std::string>& overrides);
RunConfig read_config(const std::string& yaml, const std::string& origin,
                      const std::vector<std::string>& overrides);

/// Checks ranges and combinations: divisibility, known names, the floor of target_density.
void check(const RunConfig& config);

/// The configuration as YAML, every key written out: what goes to config.yaml and into checkpoints.
/// model.vocab is no key: the token store has it.
std::string to_yaml(const RunConfig& config);
/// The inverse, bit for bit, without check().
RunConfig parse_config(const std::string& yaml, const std::string& origin);
/// The table of keys, one a line: name, default, meaning. For --help and the documentation.
std::string describe_keys();

}  // namespace entrain
