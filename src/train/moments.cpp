#include "train/moments.h"

#include <algorithm>
#include <vector>

#include "core/mirror.h"
#include "train/together.h"

namespace entrain {
namespace {

// Ranks but the first pass on what they do not keep in parts of this many elements.
constexpr int64_t part = int64_t{1} << 20;

/// Shards of one moment, from all ranks into rank 0's `whole`.
void gather(const Params& params, Tensor shard, Tensor whole, Comm& comm) {
  Mirror own(shard);
  own.download();
  std::vector<float> passing(static_cast<size_t>(part));
  for (int rank = 0; rank < comm.size(); ++rank) {
    const int64_t begin = params.shard_begin(rank), end = params.shard_begin(rank + 1);
    for (int64_t at = begin; at < end; at += part) {
      const int64_t n = std::min(part, end - at);
      float* here = comm.rank() == 0 ? whole.ptr<float>() + at : passing.data();
      if (comm.rank() == rank) std::copy_n(own.host().ptr<float>() + at - begin, n, here);
      comm.broadcast(here, static_cast<size_t>(n) * sizeof(float), rank);
    }
  }
}

}  // namespace

Moments gather_moments(const Params& params, Comm& comm) {
  Moments all{params.m(), params.v()};
  if (params.shard().count == 1) return all;
  const Shape shape{params.values().numel()};
  together(comm, [&] {
    if (comm.rank() != 0) return;
    all.memory = Buffer(2 * static_cast<size_t>(shape.numel()) * sizeof(float), Device::cpu);
    all.m = Tensor::of(all.memory.data(), shape);
    all.v = Tensor::of(all.m.ptr<float>() + shape.numel(), shape);
  });
  gather(params, params.m(), all.m, comm);
  gather(params, params.v(), all.v, comm);
  return all;
}

}  // namespace entrain
