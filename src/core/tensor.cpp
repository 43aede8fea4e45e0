#include "core/tensor.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"

namespace entrain {

size_t size_of(DType type) {
  switch (type) {
    case DType::u8:
      return 1;
    case DType::u16:
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
    case DType::u32:
      return 4;
    case DType::f64:
    case DType::u64:
      return 8;
  }
  fail("unknown type of tensor");
}

const char* name_of(DType type) {
  switch (type) {
    case DType::f32:
      return "f32";
    case DType::f64:
      return "f64";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::u8:
      return "u8";
    case DType::u16:
      return "u16";
    case DType::u32:
      return "u32";
    case DType::u64:
      return "u64";
  }
  return "?";
}

Shape::Shape(std::initializer_list<int64_t> extents) : rank(static_cast<int>(extents.size())) {
  require(rank <= max_rank, "a shape has at most {} dimensions", max_rank);
  std::copy(extents.begin(), extents.end(), extent.begin());
}

int64_t Shape::numel() const {
  int64_t n = 1;
  for (int d = 0; d < rank; ++d) n *= (*this)[d];
  return n;
}

std::string Shape::to_string() const {
  return fmt::format("[{}]", fmt::join(extent.begin(), extent.begin() + rank, ", "));
}

void Tensor::fail_as_read(DType type) const {
  fail("tensor of {} read as {}", name_of(dtype), name_of(type));
}

Tensor Tensor::of(void* data, Shape shape, DType dtype, Device device) {
  Tensor t{data, dtype, device, shape, {}};
  int64_t step = 1;
  for (int d = shape.rank - 1; d >= 0; --d) {
    t.stride[static_cast<size_t>(d)] = step;
    step *= shape[d];
  }
  return t;
}

bool Tensor::contiguous() const {
  int64_t step = 1;
  for (int d = shape.rank - 1; d >= 0; --d) {
    if (shape[d] != 1 && stride[static_cast<size_t>(d)] != step) return false;
    step *= shape[d];
  }
  return true;
}

Tensor Tensor::view(Shape other) const {
  if (!contiguous() || other.numel() != numel()) {
    fail("cannot view {} as {}", shape.to_string(), other.to_string());
  }
  return of(data, other, dtype, device);
}

Tensor Tensor::slice(int dim, int64_t begin, int64_t length) const {
  const auto d = static_cast<size_t>(dim);
  const bool within =
      dim >= 0 && dim < shape.rank && begin >= 0 && length >= 0 && begin + length <= shape[dim];
  if (!within) {  // not require(): decoding slices as it runs, and the message would be made
    fail("slice [{}, {}) leaves dimension {} of {}", begin, begin + length, dim, shape.to_string());
  }
  Tensor t = *this;
  t.shape.extent[d] = length;
  const auto offset = static_cast<size_t>(begin * stride[d]) * size_of(dtype);
  t.data = static_cast<std::byte*>(data) + offset;
  return t;
}

Tensor Tensor::split(int dim, int64_t inner) const {
  require(dim >= 0 && dim < shape.rank && shape.rank < Shape::max_rank && inner > 0 &&
              shape[dim] % inner == 0,
          "cannot split dimension {} of {} by {}", dim, shape.to_string(), inner);
  const auto d = static_cast<size_t>(dim);
  Tensor t = *this;
  ++t.shape.rank;
  std::copy_backward(shape.extent.begin() + dim, shape.extent.end() - 1, t.shape.extent.end());
  std::copy_backward(stride.begin() + dim, stride.end() - 1, t.stride.end());
  t.shape.extent[d] = shape[dim] / inner;
  t.shape.extent[d + 1] = inner;
  t.stride[d] = stride[d] * inner;
  t.stride[d + 1] = stride[d];
  return t;
}

Tensor Tensor::transpose(int a, int b) const {
  require(std::min(a, b) >= 0 && std::max(a, b) < shape.rank,
          "cannot transpose dimensions {} and {} of {}", a, b, shape.to_string());
  Tensor t = *this;
  std::swap(t.shape.extent[static_cast<size_t>(a)], t.shape.extent[static_cast<size_t>(b)]);
  std::swap(t.stride[static_cast<size_t>(a)], t.stride[static_cast<size_t>(b)]);
  return t;
}

}  // namespace entrain
