#pragma once
// Time of work on a device: by the host's clock on the CPU, by events in the stream on the GPU,
// which a graph records anew each time it is launched.
#include <chrono>
#include <vector>

#include "core/gpu.h"
#include "core/tensor.h"

namespace entrain {

class Stopwatch {
 public:
  explicit Stopwatch(Device device) : device_(device) {}

  /// Forgets what was measured. Events stay: nothing is allocated the second time.
  void reset();
  void start();
  void stop();
  /// Of all laps since reset(). On the GPU their work must be done.
  double seconds() const;

 private:
  struct Lap {
    gpu::Event begin, end;
  };

  Device device_;
  std::chrono::steady_clock::time_point begin_;
  double seconds_ = 0;
  std::vector<Lap> laps_;
  size_t used_ = 0;  // laps since reset()
};

}  // namespace entrain
