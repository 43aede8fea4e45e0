#pragma once
// Memory of a run. A Buffer owns one allocation; an Arena hands out parts of one, in stack order.
#include <cstddef>

#include "core/error.h"
#include "core/tensor.h"

namespace entrain {

/// One aligned, zero-initialised allocation. Throws OutOfMemory that says how much
/// was asked for.
class Buffer {
 public:
  Buffer() = default;
  Buffer(size_t bytes, Device device);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Device device_ = Device::cpu;
};

/// Of contiguous tensors, where they live and in the order of that device's work.
void zero(const Tensor& t);
void copy(const Tensor& from, const Tensor& to);

/// A stack of tensors. Until commit() it only counts, so a graph built once on an uncommitted arena
/// tells its peak memory before anything is allocated; built again after commit() in the same order
/// it gets the same offsets, and real memory behind them.
class Arena {
 public:
  explicit Arena(Device device) : device_(device) {}

  /// A contiguous tensor; aligned to 256 bytes.
  Tensor alloc(Shape shape, DType dtype = DType::f32);

  Device device() const { return device_; }
  size_t mark() const { return top_; }
  /// Gives back everything allocated since mark().
  void release(size_t mark) { top_ = mark; }
  /// The most bytes ever in use at once.
  size_t peak() const { return peak_; }
  /// Allocates peak() bytes and starts over from the bottom.
  void commit();

 private:
  Device device_;
  Buffer buffer_;
  bool committed_ = false;
  size_t top_ = 0;
  size_t peak_ = 0;
};

}  // namespace entrain
