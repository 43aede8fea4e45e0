#pragma once
// Kernels of the GPU are held against those of the CPU in float64, on the same values.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/arena.h"
#include "core/gpu.h"
#include "core/mirror.h"
#include "core/rng.h"
#include "kernels/kernels.h"

/// First in every test that runs on the GPU.
#define NEEDS_GPU() \
  if (!gpu::available()) GTEST_SKIP() << "no GPU: " << gpu::why_unavailable()

namespace entrain {

/// A tensor on the GPU of some type, and its like on the CPU: f64 for real types, else the same.
class Twin {
 public:
  Twin() = default;
  /// Zeros on the CPU. On the GPU reals start as NaN, so that what is never written shows.
  Twin(Shape shape, DType dtype)
      : gpu_memory_(static_cast<size_t>(shape.numel()) * size_of(dtype), Device::cuda),
        gpu(Tensor::of(gpu_memory_.data(), shape, dtype, Device::cuda)),
        mirror_(gpu) {
    const bool real = dtype == DType::f32 || dtype == DType::bf16;
    const DType wide = real ? DType::f64 : dtype;
    cpu_memory_ = Buffer(static_cast<size_t>(shape.numel()) * size_of(wide), Device::cpu);
    cpu = Tensor::of(cpu_memory_.data(), shape, wide);
    if (!real) return;
    std::fill_n(mirror_.host().ptr<float>(), shape.numel(),
                std::numeric_limits<float>::quiet_NaN());
    mirror_.upload();
  }
  /// Normal values, rounded so that bf16 holds them exactly, on both.
  static Twin normal(Shape shape, DType dtype, uint64_t seed, double deviation = 1) {
    Rng rng(seed, 0);
    return filled(shape, dtype, [&] { return deviation * rng.normal(); });
  }
  static Twin constant(Shape shape, DType dtype, double value) {
    return filled(shape, dtype, [&] { return value; });
  }
  static Twin zeros(Shape shape, DType dtype) { return constant(shape, dtype, 0); }

  /// Gives the GPU what the CPU has.
  void send() {
    const Tensor host = mirror_.host();
    if (cpu.dtype == DType::f64 && host.dtype == DType::f32) {
      for (int64_t i = 0; i < cpu.numel(); ++i) {
        host.ptr<float>()[i] = static_cast<float>(cpu.ptr<double>()[i]);
      }
    } else {
      std::memcpy(host.data, cpu.data, host.bytes());
    }
    mirror_.upload();
    gpu::synchronize();
  }
  /// The GPU's values on the host.
  Tensor fetch() {
    mirror_.download();
    return mirror_.host();
  }
  /// |gpu - cpu| / |cpu|, in the Euclidean norm; infinite where the GPU has a value that is not
  /// finite. Where the CPU has only zeros, |gpu|.
  double error() {
    const Tensor host = fetch();
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < cpu.numel(); ++i) {
      const double is = host.ptr<float>()[i], should = cpu.ptr<double>()[i];
      if (!std::isfinite(is) && is != should) return std::numeric_limits<double>::infinity();
      if (!std::isfinite(should)) continue;  // both the same infinity
      difference += (is - should) * (is - should);
      norm += should * should;
    }
    return std::sqrt(norm > 0 ? difference / norm : difference);
  }

 private:
  Buffer gpu_memory_, cpu_memory_;

 public:
  Tensor gpu, cpu;

 private:
  template <class F>
  static Twin filled(Shape shape, DType dtype, F value) {
    Twin twin(shape, dtype);
    double* at = twin.cpu.ptr<double>();
    for (int64_t i = 0; i < shape.numel(); ++i) {
      auto x = static_cast<float>(value());
      const auto bits = std::bit_cast<uint32_t>(x) & 0xffff0000u;  // exact in bf16
      at[i] = std::bit_cast<float>(bits);
    }
    twin.send();
    return twin;
  }

  Mirror mirror_;
};

/// What the type of activations allows an error to be.
inline double tolerance(DType real) {
  return real == DType::bf16 ? 1e-2 : 1e-5;
}

constexpr Kernels<Device::cpu> on_cpu;
constexpr Kernels<Device::cuda> on_gpu;

}  // namespace entrain
