#include "core/arena.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/gpu.h"

namespace entrain {
namespace {

constexpr size_t alignment = 256;
// Uncommitted arenas hand out addresses from here: never dereferenced, but distinct from null.
constexpr uintptr_t counting_base = size_t{1} << 40;

size_t round_up(size_t bytes) {
  return (bytes + alignment - 1) / alignment * alignment;
}

}  // namespace

Buffer::Buffer(size_t bytes, Device device) : bytes_(bytes), device_(device) {
  if (bytes == 0) return;
  if (device == Device::cuda) {
    data_ = gpu::allocate(bytes);
    return;
  }
  data_ = std::aligned_alloc(alignment, round_up(bytes));
  if (!data_) {
    throw OutOfMemory(fmt::format("out of memory: {:.2f} GiB were asked for at once",
                                  static_cast<double>(bytes) / (1 << 30)));
  }
  std::memset(data_, 0, round_up(bytes));
}

Buffer::~Buffer() {
  device_ == Device::cuda ? gpu::release(data_) : std::free(data_);
}

Buffer::Buffer(Buffer&& other) noexcept {
  *this = std::move(other);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

void zero(const Tensor& t) {
  t.device == Device::cuda ? gpu::zero(t.data, t.bytes())
                           : static_cast<void>(std::memset(t.data, 0, t.bytes()));
}

void copy(const Tensor& from, const Tensor& to) {
  to.device == Device::cuda ? gpu::copy(to.data, from.data, to.bytes())
                            : static_cast<void>(std::memcpy(to.data, from.data, to.bytes()));
}

Tensor Arena::alloc(Shape shape, DType dtype) {
  const size_t bytes = round_up(static_cast<size_t>(shape.numel()) * size_of(dtype));
  const size_t offset = top_;
  top_ += bytes;
  if (!committed_) {
    peak_ = std::max(peak_, top_);
    return Tensor::of(reinterpret_cast<void*>(counting_base + offset), shape, dtype, device_);
  }
  require(top_ <= buffer_.bytes(), "the arena was built differently after commit()");
  return Tensor::of(static_cast<std::byte*>(buffer_.data()) + offset, shape, dtype, device_);
}

void Arena::commit() {
  buffer_ = Buffer(peak_, device_);
  committed_ = true;
  top_ = 0;
}

}  // namespace entrain
