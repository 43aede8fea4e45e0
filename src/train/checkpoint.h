#pragma once
// Checkpoints: one HDF5 file each, run.dir/checkpoints/step_00001000.h5. Layout (h5ls explains it):
// /parameters/NAME, /moments/m/NAME and /moments/v/NAME (f32, Hugging Face names) and /rng (u64
// [3]), each with its crc32; everything else in attributes of the root, under metadata_crc32.
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/params.h"
#include "data/token_store.h"
#include "train/moments.h"

namespace entrain {

/// What a run continues from, beside parameters and moments.
struct TrainState {
  int64_t step = 0;       // optimizer steps done
  int64_t sequences = 0;  // taken from the sampler's stream
  std::array<uint64_t, 3> rng{};
  std::map<std::string, double> controller;  // of density: gamma and what drives it

  bool operator==(const TrainState&) const = default;
};

/// All that a checkpoint holds but the tensors.
struct CheckpointInfo {
  struct Parameter {
    std::string name;
    Shape shape;
  };

  TrainState state;
  std::string config_yaml;
  std::string data_fingerprint;
  std::string code_version;
  int ranks = 1;
  std::vector<Parameter> parameters;  // by name
};

/// run_dir/checkpoints/step_00001000.h5
std::string checkpoint_path(const std::string& run_dir, int64_t step);

/// Writes path.partial, flushes it to the disk, verifies it and renames it to path; leftover
/// .partial files beside it are removed first. Throws Error when that fails (a full disk), with
/// path and all other checkpoints as they were. One rank calls it.
void save_checkpoint(const std::string& path, const Params& params, const Moments& moments,
                     const TrainState& state, const std::string& config_yaml,
                     const std::string& data_fingerprint, int ranks);

/// Throws Error when the file is not a checkpoint or its metadata are damaged.
CheckpointInfo read_info(const std::string& path);

/// Reads the whole file; throws Error naming the first thing that is damaged.
void verify_checkpoint(const std::string& path);

/// Values, and the shard of moments that params has. Throws Error naming the first parameter that
/// differs from the checkpoint's in name or shape, or is damaged; params are then partly loaded.
CheckpointInfo load_checkpoint(const std::string& path, Params& params);

/// Throws Error unless tokens mean the same in the store as in the one a checkpoint was trained on.
void require_tokenizer(const std::string& checkpoint, const std::string& data_fingerprint,
                       const TokenStore& store);

struct Shared {
  std::vector<std::string> taken;    // from the checkpoint
  std::vector<std::string> adopted;  // only in params, started as their method wants beside others
  std::vector<std::string> fresh;    // only in params, left as they were
  std::vector<std::string> unused;   // only in the checkpoint
};

/// Values of all parameters that both know, for train.init_from; what only params has follows
/// Param::adopt. Throws Error when one has another shape in the checkpoint, or is damaged.
Shared load_shared(const std::string& path, Params& params);

/// The newest checkpoint in a folder that verifies, with a warning for each newer one that does
/// not; nothing when the folder has no checkpoint or does not exist. Throws Error when there are
/// checkpoints and all are damaged: to start over then is for the user to decide.
std::optional<std::string> newest_valid(const std::string& folder);

/// What train.init_from means: a checkpoint, or a run folder's newest valid one. Throws Error when
/// there is none.
std::string find_checkpoint(const std::string& file_or_run);

/// Keeps this checkpoint (which is known to be valid) and the keep - 1 newest before it; 0 keeps
/// all. Later ones, from before a return to an earlier step, stay until they are written again.
void prune(const std::string& newest, int keep);

}  // namespace entrain
