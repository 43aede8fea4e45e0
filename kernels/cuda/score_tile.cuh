#pragma once
// Scores of queries against compressed keys, as routers take them: in double, because a choice made
// from them must not depend on rounding. The products run on the tensor cores, which multiply
// doubles at twice the rate of the other units of an H100.
//
// A block holds one tile: the (query, head) rows of consecutive queries of one kv head, query by
// query, as doubles in shared memory, and their scores beside them. The keys, a few hundred rows
// that all tiles share, stay in L2: a warp loads its fragments of them straight into registers.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

/// From row to row of a matrix in shared memory, in doubles. 8 modulo 16: then fragments of
/// neighbouring rows lie in different banks.
__host__ __device__ constexpr int row_step(int64_t width) {
  return static_cast<int>((width + 15) / 16 * 16 + 8);
}

/// c [16, 8] += a [16, 8] b [8, 8]. Lane 4 x + t holds a[x][2t], a[x + 8][2t], a[x][2t + 1],
/// a[x + 8][2t + 1]; b[2t][x], b[2t + 1][x]; c[x][2t], c[x][2t + 1], c[x + 8][2t],
/// c[x + 8][2t + 1]. (The instruction calls the summed indices 2t and 2t + 1 by other names, which
/// does not matter to a sum, and so two of them can be loaded at once.)
__device__ __forceinline__ void multiply(double (&c)[4], const double (&a)[4],
                                         const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a[i] belongs to rows x + 8 (i % 2) and to b[i / 2]
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c[i % 2 * 2]), "+d"(c[i % 2 * 2 + 1])
        : "d"(a[i]), "d"(b[i / 2]));
  }
#endif
}

/// a of multiply() from rows x and x + 8 in shared memory, from the first summed index on.
__device__ __forceinline__ void load_rows(double (&a)[4], const double* row_x,
                                          const double* row_x8) {
  const int t = threadIdx.x % 4;
  const auto low = *reinterpret_cast<const double2*>(row_x + 2 * t);
  const auto high = *reinterpret_cast<const double2*>(row_x8 + 2 * t);
  a[0] = low.x;
  a[1] = high.x;
  a[2] = low.y;
  a[3] = high.y;
}

/// The (query, head) rows of queries [first, first + count) of one kv head times scale, and rows
/// and columns of zeros up to whole tiles of 16 rows and 8 columns. q: head 0 of the group, its
/// query `first`.
template <class T>
__device__ void load_queries(const T* q, int64_t head_step, int64_t token_step, int count, int g,
                             int D, double scale, double* out) {
  const int rows = (count * g + 15) / 16 * 16, width = (D + 7) / 8 * 8, step = row_step(D);
  for (int x = threadIdx.x; x < rows * width; x += blockDim.x) {
    const int row = x / width, d = x % width;
    const bool within = row < count * g && d < D;
    out[row * step + d] =
        within ? scale * to_float(q[row % g * head_step + row / g * token_step + d]) : 0.0;
  }
}

/// Two neighbouring elements as doubles; at must be even elements into aligned rows.
template <class K>
__device__ __forceinline__ void load_pair(double (&b)[2], const K* at) {
  const auto pair = *reinterpret_cast<const Pack<K, 2>*>(at);
  b[0] = static_cast<double>(pair.at[0]);
  b[1] = static_cast<double>(pair.at[1]);
}
template <>
__device__ __forceinline__ void load_pair(double (&b)[2], const bf16* at) {
  const auto pair = *reinterpret_cast<const Pack<bf16, 2>*>(at);
  b[0] = to_float(pair.at[0]);
  b[1] = to_float(pair.at[1]);
}

/// z[row][c] = query row . key c, for c < width, and 0 up to the next multiple of 16. A warp takes
/// 32 rows and 16 keys at a time; keys of the next 8 dimensions are on their way meanwhile.
template <class K>
__device__ void score(const double* queries, int rows, int D, const K* keys, int64_t key_step,
                      int width, double* z, int z_step) {
  const int warp = threadIdx.x / 32, x = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int step = row_step(D), row_items = (rows + 31) / 32;
  const int items = row_items * ((width + 15) / 16), warps = static_cast<int>(blockDim.x) / 32;
  for (int item = warp; item < items; item += warps) {
    const int m = item % row_items * 32, n = item / row_items * 16;
    const bool second = m + 16 < rows;  // the rows from m + 16 on: the same in all of the warp
    const double* row = queries + (m + x) * step;
    const K* key[2] = {keys + (n + x) * key_step + 2 * t, keys + (n + x + 8) * key_step + 2 * t};
    auto load_keys = [&](double(&b)[2][2], int d) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        b[j][0] = b[j][1] = 0;
        if (n + x + 8 * j < width && d + 2 * t < D) load_pair(b[j], key[j] + d);
      }
    };
    double c[2][2][4] = {}, b[2][2], next[2][2];
    load_keys(b, 0);
#pragma unroll 1  // registers are short, and the products take longer than the moves
    for (int d = 0; d < D; d += 8) {
      load_keys(next, d + 8);
      double a[4];
      load_rows(a, row + d, row + 8 * step + d);
      multiply(c[0][0], a, b[0]);
      multiply(c[0][1], a, b[1]);
      if (second) {
        load_rows(a, row + 16 * step + d, row + 24 * step + d);
        multiply(c[1][0], a, b[0]);
        multiply(c[1][1], a, b[1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j / 2][j % 2] = next[j / 2][j % 2];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 16 (i / 4): rows; 8 (i / 2 % 2): rows; 8 (i % 2): columns
      const int to = m + i / 4 * 16 + i / 2 % 2 * 8 + x;
      const double* pair = c[i / 4][i % 2] + i / 2 % 2 * 2;
      if (to < rows) {
        *reinterpret_cast<double2*>(z + to * z_step + n + i % 2 * 8 + 2 * t) =
            make_double2(pair[0], pair[1]);
      }
    }
  }
}

/// Threads of a block that holds a tile.
constexpr int tile_threads = 256;

template <class Kernel, class... Args>
void launch_tiles(const char* name, Kernel kernel, dim3 grid, int64_t shared, const Args&... args) {
  const auto bytes = static_cast<int>(shared);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  kernel<<<grid, tile_threads, static_cast<size_t>(bytes), stream()>>>(args...);
  check_launch(name);
}

/// Bytes of shared memory that a block can have, and those that leave room for a second.
struct SharedMemory {
  int64_t most, half;

  static SharedMemory of_device() {
    static const int bytes = [] {
      int device = 0, most = 0;
      check(cudaGetDevice(&device), "cudaGetDevice");
      check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            "cudaDeviceGetAttribute");
      return most;
    }();
    return {bytes, bytes / 2 - 512};  // each block takes 1 KB more
  }
};

/// Fails unless two neighbouring elements of a [B, H, N, D] view can be loaded at once.
inline void check_pairs(const char* name, const Tensor& t) {
  const auto pair = 2 * size_of(t.dtype);
  bool even = t.shape.rank == 4 && t[3] % 2 == 0 && reinterpret_cast<uintptr_t>(t.data) % pair == 0;
  for (int d = 0; even && d < 3; ++d) even = t[d] < 2 || t.stride[static_cast<size_t>(d)] % 2 == 0;
  if (even) return;
  fail(std::string("routing: ") + name + " " + t.shape.to_string() +
       " needs an even head_dim and rows that begin at even places");
}

}  // namespace entrain::cuda
