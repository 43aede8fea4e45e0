#pragma once
// How much of the keys attention reads, and how to make it read so much.
#include <functional>

#include "core/mirror.h"

namespace entrain::cli {

/// The counters of what attention read, see ReadField, summed over kv heads.
class ReadCounters {
 public:
  ReadCounters() = default;
  explicit ReadCounters(Tensor read) : read_(read) {}

  struct Read {
    double pairs, causal, flops;
    double density() const { return pairs / causal; }
  };
  /// What `forward` reads.
  Read during(const std::function<void()>& forward);

 private:
  Mirror read_;
};

/// Turns gamma until the density that it leads to is within 1 percent of the target, or as near as
/// it gets, and returns that.
double seek(double* gamma, double target, const std::function<double()>& density);

/// How many blocks neighbouring queries attend together, per block that each attends: 1 where all
/// choose alike. The mean over tiles of `tile` queries; mask u64 [B, Hkv, N, words].
double union_factor(Tensor mask, int64_t block, int64_t tile);

}  // namespace entrain::cli
