// Copies of views and sums. A thread takes a pack of 16 bytes; memory bounds all of it.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int threads = 256;

/// Blocks of threads that take so many items, one each.
unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(ceil_div(items, threads));
}

__device__ __forceinline__ int64_t item_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
}

/// Device memory of a tensor of any type.
std::byte* bytes_of(const Tensor& t) {
  if (t && t.device != Device::cuda) fail_outside(t);
  return static_cast<std::byte*>(t.data);
}

bool aligned(const Tensor& t, size_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
}

// Elements [item n, item n + n) of `count`; the last pack may be short.
template <class T, int n>
__global__ void add_packs(const T* a, const T* b, T* y, int64_t count) {
  const int64_t item = item_of_thread(), left = count - item * n;
  if (left >= n) {
    const Pack<T, n> x = reinterpret_cast<const Pack<T, n>*>(a)[item];
    const Pack<T, n> z = reinterpret_cast<const Pack<T, n>*>(b)[item];
    Pack<T, n> sum;
    for (int e = 0; e < n; ++e) sum.at[e] = from_float<T>(to_float(x.at[e]) + to_float(z.at[e]));
    reinterpret_cast<Pack<T, n>*>(y)[item] = sum;
  } else {
    for (int64_t i = item * n; i < count; ++i)
      y[i] = from_float<T>(to_float(a[i]) + to_float(b[i]));
  }
}

/// A view [B, H, N, D] as rows of units, which are what one access moves.
template <class Unit>
struct UnitRows {
  Unit* data;
  int64_t step[3];

  explicit UnitRows(const Tensor& t) : data(reinterpret_cast<Unit*>(bytes_of(t))) {
    for (int d = 0; d < 3; ++d) {
      step[d] =
          t.stride[d] * static_cast<int64_t>(size_of(t.dtype)) / static_cast<int64_t>(sizeof(Unit));
    }
  }
};

template <class Unit>
__global__ void move_rows(UnitRows<Unit> from, UnitRows<Unit> to, int64_t H, int64_t N,
                          int64_t width, int64_t count) {
  const int64_t item = item_of_thread();
  if (item >= count) return;
  const int64_t row = item / width, u = item - row * width;
  const int64_t head = row / N, i = row - head * N, b = head / H, h = head - b * H;
  to.data[b * to.step[0] + h * to.step[1] + i * to.step[2] + u] =
      from.data[b * from.step[0] + h * from.step[1] + i * from.step[2] + u];
}

template <class Unit>
void copy_units(const Tensor& from, const Tensor& to) {
  const int64_t width =
      to[3] * static_cast<int64_t>(size_of(to.dtype)) / static_cast<int64_t>(sizeof(Unit));
  const int64_t count = to[0] * to[1] * to[2] * width;
  move_rows<Unit><<<blocks_for(count), threads, 0, stream()>>>(
      UnitRows<Unit>(from), UnitRows<Unit>(to), to[1], to[2], width, count);
}

}  // namespace

template <>
void Kernels<Device::cuda>::copy_rows(Tensor from, Tensor to) const {
  if (to.numel() == 0) return;
  const size_t size = size_of(to.dtype);
  if (from.dtype != to.dtype) fail("copy_rows between types");
  bool whole = to[3] * size % 16 == 0;
  for (const Tensor& t : {from, to}) {
    whole = whole && aligned(t, 16);
    for (int d = 0; d < 3; ++d) whole = whole && t.stride[d] * size % 16 == 0;
  }
  if (whole) {
    copy_units<uint4>(from, to);
  } else if (size == 8) {
    copy_units<uint64_t>(from, to);
  } else if (size == 4) {
    copy_units<uint32_t>(from, to);
  } else {
    copy_units<uint16_t>(from, to);
  }
  check_launch("copy_rows");
}

template <>
void Kernels<Device::cuda>::add(Tensor a, Tensor b, Tensor y) const {
  const int64_t count = y.numel();
  if (count == 0) return;
  by_type(y, [&]<class T>(T) {
    const auto launch = [&]<int n>(std::integral_constant<int, n>) {
      add_packs<T, n><<<blocks_for(ceil_div(count, n)), threads, 0, stream()>>>(
          pointer<T>(a), pointer<T>(b), pointer<T>(y), count);
    };
    aligned(a, 16) && aligned(b, 16) && aligned(y, 16)
        ? launch(std::integral_constant<int, 16 / sizeof(T)>{})
        : launch(std::integral_constant<int, 1>{});
  });
  check_launch("add");
}

}  // namespace entrain
