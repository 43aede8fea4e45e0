#include "core/mirror.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/gpu.h"

namespace entrain {
namespace {

/// To nearest, ties to even; NaN stays NaN.
BFloat16 rounded(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float widened(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

}  // namespace

Pinned::Pinned(Shape shape, DType dtype) : on_gpu_(gpu::available()) {
  const size_t bytes = static_cast<size_t>(shape.numel()) * size_of(dtype);
  host_ = Tensor::of(on_gpu_ ? gpu::allocate_pinned(bytes) : std::malloc(bytes), shape, dtype);
  require(host_.data != nullptr, "out of memory: {} bytes", bytes);
  std::memset(host_.data, 0, bytes);
}

Pinned::~Pinned() {
  on_gpu_ ? gpu::release_pinned(host_.data) : std::free(host_.data);
}

Mirror::Mirror(Tensor tensor) : tensor_(tensor), host_(tensor) {
  if (!tensor || tensor.device == Device::cpu) return;
  require(tensor.contiguous(), "only contiguous tensors have a mirror");
  const bool narrow = tensor.dtype == DType::bf16;
  const auto n = static_cast<size_t>(tensor.numel());
  // bf16 values lie behind their float copies.
  pinned_ = gpu::allocate_pinned(narrow ? n * (sizeof(float) + sizeof(BFloat16)) : tensor.bytes());
  host_ = Tensor::of(pinned_, tensor.shape, narrow ? DType::f32 : tensor.dtype);
}

Mirror::~Mirror() {
  gpu::release_pinned(pinned_);
}

Mirror::Mirror(Mirror&& other) noexcept {
  *this = std::move(other);
}

Mirror& Mirror::operator=(Mirror&& other) noexcept {
  std::swap(tensor_, other.tensor_);
  std::swap(host_, other.host_);
  std::swap(pinned_, other.pinned_);
  return *this;
}

void Mirror::download() {
  if (!pinned_) return;
  if (tensor_.dtype != DType::bf16) {
    gpu::to_host(pinned_, tensor_.data, tensor_.bytes());
    return gpu::synchronize();
  }
  float* wide = host_.ptr<float>();
  auto* narrow = reinterpret_cast<BFloat16*>(wide + host_.numel());
  gpu::to_host(narrow, tensor_.data, tensor_.bytes());
  gpu::synchronize();
  for (int64_t i = 0; i < host_.numel(); ++i) wide[i] = widened(narrow[i]);
}

void Mirror::upload() {
  start_upload();
  if (pinned_) gpu::synchronize();
}

void Mirror::start_upload() {
  if (!pinned_) return;
  if (tensor_.dtype != DType::bf16) return gpu::to_device(tensor_.data, pinned_, tensor_.bytes());
  const float* wide = host_.ptr<float>();
  auto* narrow = reinterpret_cast<BFloat16*>(host_.ptr<float>() + host_.numel());
  for (int64_t i = 0; i < host_.numel(); ++i) narrow[i] = rounded(wide[i]);
  gpu::to_device(tensor_.data, narrow, tensor_.bytes());
}

}  // namespace entrain
