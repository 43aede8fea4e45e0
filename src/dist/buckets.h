#pragma once
// Gradients on their way to be summed over ranks, merged until a message is worth its start.
#include "core/stopwatch.h"
#include "dist/comm.h"

namespace entrain {

class Buckets {
 public:
  /// Starts a sum once there are `least` bytes.
  explicit Buckets(Comm& comm, size_t least = size_t{8} << 20)
      : comm_(comm), least_(least), waiting_(comm.device()) {}

  /// A stretch of the flat gradients, final from now on. Stretches come from back to front; gaps
  /// between them, which hold zeros, are summed too.
  void add(Tensor stretch);
  /// Starts what is left and completes all sums, as Comm::wait() does.
  void wait();
  /// What the last wait() took: sums that no work hides, and ranks that come later. On the GPU its
  /// work must be done.
  double waited_seconds() const { return waiting_.seconds(); }

 private:
  void start();

  Comm& comm_;
  size_t least_;
  Tensor pending_;
  Stopwatch waiting_;
};

}  // namespace entrain
