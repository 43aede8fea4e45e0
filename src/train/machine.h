#pragma once
// What this machine can do, measured: the yardstick of speeds and memory.
#include <cstddef>
#include <string>

#include "core/arena.h"

namespace entrain {

/// Operations a second of the library's matrix product, the median of several: on the CPU BLAS's in
/// float32 of 1024^3, with as many threads as this process has; on the GPU cuBLAS's in bf16 of
/// 8192^3.
class MatmulRate {
 public:
  explicit MatmulRate(Device device);
  double measure();
  std::string name() const;

 private:
  Device device_;
  int64_t n_;
  Arena memory_;
  Tensor x_, w_, y_;
};

/// Bytes a second that memory gives, read and written, the median of several: the sum of two arrays
/// into a third, larger than caches.
class MemoryRate {
 public:
  explicit MemoryRate(Device device);
  double measure();

 private:
  Device device_;
  Arena memory_;
  Tensor a_, b_, y_;
};

/// Bytes of memory this machine has.
size_t physical_bytes();

/// Bytes this process holds in memory now, and the most it has held since it began, or since
/// reset_peak_resident() where the system grants that.
size_t resident_bytes();
size_t peak_resident_bytes();
void reset_peak_resident();

/// The same of a device's memory; of the GPU's, what is in use now, by whomever: a run takes what
/// it needs before its first step and keeps it.
size_t held_bytes(Device device);
size_t peak_held_bytes(Device device);

}  // namespace entrain
