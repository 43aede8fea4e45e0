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
namespace {

/// The median of what several runs of f do in a second, each so much.
template <class F>
double rate(Device device, double amount, F f) {
  std::vector<double> rates;
  Stopwatch watch(device);
  for (int i = 0; i < 9; ++i) {
    watch.reset();
    watch.start();
    with_kernels(device, f);
    watch.stop();
    if (device == Device::cuda) gpu::synchronize();
    rates.push_back(amount / watch.seconds());
  }
  return median(rates);
}

}  // namespace

MatmulRate::MatmulRate(Device device)
    : device_(device), n_(device == Device::cuda ? 8192 : 1024), memory_(device) {
  const DType dtype = device == Device::cuda ? DType::bf16 : DType::f32;
  for (const bool committed : {false, true}) {
    if (committed) memory_.commit();
    for (Tensor* t : {&x_, &w_, &y_}) *t = memory_.alloc({n_, n_}, dtype);
  }
  // Random values, as products of constants run faster on a GPU; a few, over and over.
  std::vector<float> some(size_t{1} << 16);
  Rng rng(1, 0);
  for (float& value : some) value = static_cast<float>(rng.uniform()) - 0.5f;
  for (const Tensor& t : {x_, w_}) {
    Mirror mirror(t);
    float* values = mirror.host().ptr<float>();
    for (int64_t i = 0; i < t.numel(); ++i) values[i] = some[static_cast<size_t>(i) % some.size()];
    mirror.upload();
  }
}

double MatmulRate::measure() {
  const auto n = static_cast<double>(n_);
  return rate(device_, 2 * n * n * n, [&](auto kernels) { kernels.linear(x_, w_, y_); });
}

std::string MatmulRate::name() const {
  return device_ == Device::cuda ? "bf16 matrix product 8192^3" : "float32 matrix product 1024^3";
}

MemoryRate::MemoryRate(Device device) : device_(device), memory_(device) {
  const int64_t elements = int64_t{1} << (device == Device::cuda ? 28 : 24);
  const DType dtype = device == Device::cuda ? DType::bf16 : DType::f32;
  for (const bool committed : {false, true}) {
    if (committed) memory_.commit();
    for (Tensor* t : {&a_, &b_, &y_}) *t = memory_.alloc({elements}, dtype);
  }
}

double MemoryRate::measure() {
  const auto bytes = static_cast<double>(a_.bytes() + b_.bytes() + y_.bytes());
  return rate(device_, bytes, [&](auto kernels) { kernels.add(a_, b_, y_); });
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

size_t held_bytes(Device device) {
  if (device == Device::cpu) return resident_bytes();
  const gpu::Info gpu = gpu::info();
  return gpu.total_bytes - gpu.free_bytes;
}

size_t peak_held_bytes(Device device) {
  return device == Device::cuda ? held_bytes(device) : peak_resident_bytes();
}

void reset_peak_resident() {
  ::malloc_trim(0);  // what was freed would count as held
  std::ofstream("/proc/self/clear_refs") << '5';
}

}  // namespace entrain
