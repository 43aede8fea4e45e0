#pragma once
// AdamW's moments of all parameters, as checkpoints hold them.
#include "core/arena.h"
#include "core/params.h"
#include "dist/comm.h"

namespace entrain {

/// Flat, like the buffers of Params.
struct Moments {
  Tensor m, v;
  Buffer memory = {};  // theirs where they were gathered
};

/// Every rank calls it; rank 0 gets whole moments: its own, or where they are sharded, those of all
/// ranks, in the host's memory.
Moments gather_moments(const Params& params, Comm& comm);

}  // namespace entrain
