#pragma once
// What this machine can do, measured: the yardstick of speeds and memory.
#include <cstddef>

namespace entrain {

/// Operations a second of BLAS's float32 matrix product of n^3, the median of several; with as many
/// threads as this process has.
double matmul_rate(int n = 1024);

/// Bytes this process holds in memory now, and the most it has held since it began, or since
/// reset_peak_resident() where the system grants that.
size_t resident_bytes();
size_t peak_resident_bytes();
void reset_peak_resident();

}  // namespace entrain
