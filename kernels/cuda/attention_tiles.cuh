#pragma once
// Tiles of bf16 rows in shared memory, copies into them, and a warp's products with them: what the
// bf16 attention kernels are made of.
#include <type_traits>

#include "kernels/cuda/mma.cuh"

namespace entrain::cuda {

constexpr int attention_threads = 128;  // 4 warps

/// Rows of D bf16 in shared memory. The 16-byte chunks of a row are permuted within 128 bytes such
/// that the same chunk of eight rows, which ldmatrix reads together, lies in different banks.
template <int D>
struct SharedTile {
  static constexpr uint32_t chunks = D / 8, turns = chunks < 8 ? chunks : 8, row_bytes = 2 * D;
  uint32_t address;

  __host__ __device__ static constexpr size_t bytes(int rows) {
    return row_bytes * static_cast<size_t>(rows);
  }
  /// Of tiles of 64 rows that lie one after the other.
  __device__ static SharedTile nth(uint32_t first, int n) {
    return {first + static_cast<uint32_t>(n) * 64 * row_bytes};
  }
  __device__ uint32_t chunk(uint32_t row, uint32_t c) const {
    const uint32_t turn = row / (8 / turns) % turns;
    return address + row * row_bytes + c / turns * 128 + (c % turns ^ turn) * 16;
  }
  // Fragments of rows [row, row + 16), row a multiple of 8, and columns [16 step, 16 step + 16). A
  // lane's address is what it would be for row 0, plus what is known when the code is compiled.
  __device__ uint32_t lane(uint32_t lane_row, uint32_t c, uint32_t row, uint32_t step) const {
    return chunk(lane_row, step * 2 % turns + c) + (row * row_bytes + step * 2 / turns * 128);
  }
  /// A left operand.
  __device__ void left(Fragment& to, uint32_t row, uint32_t step) const {
    load_matrices(to, lane(threadIdx.x % 16, threadIdx.x / 16 % 2, row, step));
  }
  /// Two right operands of a b^T, 8 rows each.
  __device__ void right(Fragment& to, uint32_t row, uint32_t step) const {
    const uint32_t lane_row = threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8;
    load_matrices(to, lane(lane_row, threadIdx.x / 8 % 2, row, step));
  }
  /// Two right operands of a b, 8 columns each.
  __device__ void right_transposed(Fragment& to, uint32_t row, uint32_t step) const {
    load_matrices_transposed(to, lane(threadIdx.x % 16, threadIdx.x / 16 % 2, row, step));
  }
};

/// Rows of a batch's heads, from one of them on; offsets fit 32 bits, see wide_rows().
struct HeadRows {
  bf16* first;
  uint32_t head_step, token_step;

  __device__ HeadRows(const Rows<bf16>& x, int b, int head)
      : first(x.at(b, head, 0)),
        head_step(static_cast<uint32_t>(x.head_step)),
        token_step(static_cast<uint32_t>(x.token_step)) {}
  __device__ bf16* at(uint32_t head, uint32_t i) const {
    return first + (head * head_step + i * token_step);
  }
};

/// Calls f(row, d, wide) for the chunks of 8 elements, from column d on, of a tile's rows; wide
/// tells f at compile time whether to copy 16 bytes or 4 at a time.
template <int rows, int D, class F>
__device__ __forceinline__ void for_chunks(bool wide, F f) {
  constexpr int chunks = D / 8, step = attention_threads / chunks;
  constexpr int unroll = rows / step <= 8 ? rows / step : 4;
  const int row = static_cast<int>(threadIdx.x) / chunks;
  const int d = static_cast<int>(threadIdx.x) % chunks * 8;
  if (wide) {
#pragma unroll unroll
    for (int i = 0; i < rows; i += step) f(i + row, d, std::true_type{});
  } else {
#pragma unroll 1
    for (int i = 0; i < rows; i += step) f(i + row, d, std::false_type{});
  }
}

/// Starts copying a chunk of a row to a tile: zeros where it is not valid, and after head_dim.
template <bool wide, int D>
__device__ __forceinline__ void copy_chunk(SharedTile<D> to, int row, int d, const bf16* from,
                                           bool valid, int head_dim) {
  const uint32_t address = to.chunk(row, d / 8);
  if constexpr (wide) {
    copy_async<16>(address, from + d, valid && d < head_dim);
  } else {
    for (int e = 0; e < 8; e += 2) {
      copy_async<4>(address + e * sizeof(bf16), from + d + e, valid && d + e < head_dim);
    }
  }
}

/// A warp's rows of a tile, 16 a slab, as the left operand of products over D: in registers as far
/// as they suffice.
template <int D, int slabs>
class LeftOperand {
 public:
  __device__ LeftOperand(SharedTile<D> tile, uint32_t row) : tile_(tile), row_(row) {
    if constexpr (held) {
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
#pragma unroll
        for (int step = 0; step < steps; ++step) {
          tile_.left(fragments_[m][step], row_ + 16 * m, step);
        }
      }
    }
  }
  __device__ void get(Fragment& to, int m, int step) const {
    if constexpr (held) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = fragments_[m][step][i];
    } else {
      tile_.left(to, row_ + 16 * m, step);
    }
  }

 private:
  static constexpr bool held = D <= 64;
  static constexpr int steps = held ? D / 16 : 1;
  SharedTile<D> tile_;
  uint32_t row_;
  Fragment fragments_[slabs][steps];
};

/// c += a b^T over D, with b's rows [row, row + 8 n).
template <int D, int slabs, int n>
__device__ __forceinline__ void rows_by_rows(float (&c)[slabs][n][4],
                                             const LeftOperand<D, slabs>& a, SharedTile<D> b,
                                             int row) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    Fragment left[slabs];
#pragma unroll
    for (int m = 0; m < slabs; ++m) a.get(left[m], m, step);
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      Fragment right;
      b.right(right, row + 8 * j, step);
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
        mma(c[m][j], left[m], right[0], right[1]);
        mma(c[m][j + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// c += a b: a [16 slabs, 8 n] are accumulators, which are rounded; b's rows are [row, row + 8 n),
/// its columns those from 16 step on.
template <int D, int slabs, int n, int columns>
__device__ __forceinline__ void weighted_rows(float (&c)[slabs][columns][4],
                                              const float (&a)[slabs][n][4], SharedTile<D> b,
                                              int row, int step = 0) {
#pragma unroll
  for (int k = 0; k < n; k += 2) {
    Fragment left[slabs];
#pragma unroll
    for (int m = 0; m < slabs; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &a[m][k + i / 2][i % 2 * 2];
        left[m][i] = pack(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < columns; j += 2) {
      Fragment right;
      b.right_transposed(right, row + 8 * k, step + j / 2);
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
        mma(c[m][j], left[m], right[0], right[1]);
        mma(c[m][j + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// Sums over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// The largest of them; NaN is passed over.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/// A thread's rows of the accumulators of a warp's slabs: i = 0, 1 of slab m.
template <int slabs>
__device__ __forceinline__ int row_of(int m, int i) {
  const auto warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  return (warp * slabs + m) * 16 + i * 8 + lane / 4;
}

}  // namespace entrain::cuda
