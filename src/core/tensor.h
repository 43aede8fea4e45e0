#pragma once
// A tensor is a view: a pointer, a type, a shape and strides. Memory belongs to a Buffer or an
// Arena.
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace entrain {

enum class Device : uint8_t { cpu, cuda };
enum class DType : uint8_t { f32, f64, bf16, i32, u8, u16, u32, u64 };

/// bf16 where no code computes with it: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

size_t size_of(DType type);
const char* name_of(DType type);

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<uint8_t>() {
  return DType::u8;
}
template <>
constexpr DType dtype_of<uint16_t>() {
  return DType::u16;
}
template <>
constexpr DType dtype_of<uint32_t>() {
  return DType::u32;
}
template <>
constexpr DType dtype_of<uint64_t>() {
  return DType::u64;
}

/// Up to four extents, outermost first.
struct Shape {
  static constexpr int max_rank = 4;

  Shape() = default;
  Shape(std::initializer_list<int64_t> extents);

  int64_t operator[](int dim) const { return extent[static_cast<size_t>(dim)]; }
  int64_t numel() const;
  bool operator==(const Shape&) const = default;
  std::string to_string() const;  // "[2, 80, 64]"

  int rank = 0;
  std::array<int64_t, max_rank> extent{};
};

/// Strides are in elements. A default-constructed tensor is empty and converts to false.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  Shape shape;
  std::array<int64_t, Shape::max_rank> stride{};

  /// A contiguous tensor over existing memory.
  static Tensor of(void* data, Shape shape, DType dtype = DType::f32, Device device = Device::cpu);

  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int dim) const { return shape[dim]; }
  int64_t numel() const { return shape.numel(); }
  size_t bytes() const { return static_cast<size_t>(numel()) * size_of(dtype); }
  bool contiguous() const;

  template <class T>
  T* ptr() const {
    if (dtype != dtype_of<T>()) fail_as_read(dtype_of<T>());
    return static_cast<T*>(data);
  }

  [[noreturn]] void fail_as_read(DType type) const;  // not inline: nvcc cannot read fmt's formats

  /// The same elements under another shape; the tensor must be contiguous.
  Tensor view(Shape shape) const;
  /// Elements [begin, begin + length) of one dimension.
  Tensor slice(int dim, int64_t begin, int64_t length) const;
  /// One dimension of n * inner elements as two, n and inner.
  Tensor split(int dim, int64_t inner) const;
  /// The two dimensions exchanged.
  Tensor transpose(int a, int b) const;
};

}  // namespace entrain
