#include "train/machine.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/gpu.h"
#include "core/median.h"
#include "core/mirror.h"
#include "core/rng.h"
#include "core/stopwatch.h"
#include "kernels/kernels.h"

namespace entrain {

double matmul_rate(Device device) {
  const int n = device == Device::cuda ? 8192 : 1024;
  Arena arena(device);
  Tensor x, w, y;
  for (const bool committed : {false, true}) {
    if (committed) arena.commit();
    const auto matrix = [&] {
      return arena.alloc({n, n}, device == Device::cuda ? DType::bf16 : DType::f32);
    };
    x = matrix(), w = matrix(), y = matrix();
  }
  // Random values: products of constants run faster on a GPU.
  for (const Tensor& t : {x, w}) {
    Mirror values(t);
    Rng rng(1, 0);
    for (int64_t i = 0; i < t.numel(); ++i) {
      values.host().ptr<float>()[i] = static_cast<float>(rng.uniform()) - 0.5f;
    }
    values.upload();
  }
  std::vector<double> rates;
  Stopwatch watch(device);
  for (int i = 0; i < 9; ++i) {
    watch.reset();
    watch.start();
    with_kernels(device, [&](auto kernels) { kernels.linear(x, w, y); });
    watch.stop();
    if (device == Device::cuda) gpu::synchronize();
    rates.push_back(2.0 * n * n * n / watch.seconds());
  }
  return median(rates);
}

std::string matmul_name(Device device) {
  return device == Device::cuda ? "bf16 matrix product 8192^3" : "float32 matrix product 1024^3";
}

size_t physical_bytes() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  size_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

size_t peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;  // in kB
  }
  return resident_bytes();
}

void reset_peak_resident() {
  ::malloc_trim(0);  // what was freed would count as held
  std::ofstream("/proc/self/clear_refs") << '5';
}

}  // namespace entrain
