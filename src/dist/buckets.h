#pragma once
// Gradients on their way to be summed over ranks, merged until a message is worth its start.
#include "dist/comm.h"

namespace entrain {

class Buckets {
 public:
  /// Starts a sum once there are `least` bytes.
  explicit Buckets(Comm& comm, size_t least = size_t{8} << 20) : comm_(comm), least_(least) {}

  /// A stretch of the flat gradients, final from now on. Stretches come from back to front; gaps
  /// between them, which hold zeros, are summed too.
  void add(Tensor stretch);
  /// Starts what is left and completes all sums, as Comm::wait() does.
  void wait();

 private:
  void start();

  Comm& comm_;
  size_t least_;
  Tensor pending_;
};

}  // namespace entrain
