#pragma once
// What attention read, as densities: over everything, and per layer and kv head.
#include <vector>

#include "core/mirror.h"
#include "dist/comm.h"

namespace entrain {

struct HeadRead {
  double density = 0;         // query-key pairs attended, over those a causal query could attend
  double router_density = 0;  // entries the router read, over the same
  double active_blocks = 0;   // blocks attended by a query, on average
};

struct ReadReport {
  HeadRead all;
  double flops = 0;  // of attention for a token in a training step, over all layers: read_flops
  std::vector<std::vector<HeadRead>> heads;  // [layer][kv head]
};

/// Sums the counters f64 [n_layer, Hkv, read_fields] over ranks, clears them and divides. Allocates
/// nothing where the report is of the same shape already.
void collect_read(Comm& comm, Mirror& counters, ReadReport& report);

}  // namespace entrain
