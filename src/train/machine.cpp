#include "train/machine.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <vector>

#include "core/arena.h"
#include "kernels/kernels.h"

namespace entrain {

double matmul_rate(int n) {
  Arena arena(Device::cpu);
  Tensor x, w, y;
  for (const bool committed : {false, true}) {
    if (committed) arena.commit();
    x = arena.alloc({n, n}), w = arena.alloc({n, n}), y = arena.alloc({n, n});
  }
  std::fill_n(x.ptr<float>(), x.numel(), 0.5f);
  std::fill_n(w.ptr<float>(), w.numel(), 0.25f);
  std::vector<double> rates;
  for (int i = 0; i < 9; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    Kernels<Device::cpu>{}.linear(x, w, y);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    rates.push_back(2.0 * n * n * n / seconds.count());
  }
  std::nth_element(rates.begin(), rates.begin() + 4, rates.end());
  return rates[4];
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
