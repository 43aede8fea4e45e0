#pragma once
// Matrix products of tiles that fit the caches, for one thread. The micro-kernel keeps an MR x
// 2-vector block of C in registers and streams rows of B past it; GCC's vector types map to
// whatever the target has. Large products go to BLAS instead (linear.cpp).
#include <cstdint>
#include <cstring>

namespace entrain::tile {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int max_rows = 12;  // 24 accumulators of 32 registers
#else
constexpr int vector_bytes = 32;
constexpr int max_rows = 6;  // 12 accumulators of 16 registers (AVX2)
#endif

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  static constexpr int lanes = vector_bytes / sizeof(T);
};

/// C[rows, NV vectors] = (or +=) A B. A's element (i, p) is at a[i * row_step + p * depth_step].
template <class T, int Rows, int NV>
inline void micro(int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* b,
                  int64_t ldb, T* c, int64_t ldc, bool add) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  V acc[Rows][NV];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < NV; ++j) {
      if (add) {
        std::memcpy(&acc[i][j], c + i * ldc + j * lanes, sizeof(V));
      } else {
        acc[i][j] = V{};
      }
    }
  }
  for (int64_t p = 0; p < depth; ++p) {
    V bv[NV];
    for (int j = 0; j < NV; ++j) std::memcpy(&bv[j], b + p * ldb + j * lanes, sizeof(V));
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T s = a[i * row_step + p * depth_step];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += s * bv[j];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < NV; ++j) std::memcpy(c + i * ldc + j * lanes, &acc[i][j], sizeof(V));
  }
}

template <class T, int NV, int Rows = max_rows>
inline void rows_of(int64_t m, int64_t depth, const T* a, int64_t row_step, int64_t depth_step,
                    const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  for (; m >= Rows; m -= Rows, a += Rows * row_step, c += Rows * ldc) {
    micro<T, Rows, NV>(depth, a, row_step, depth_step, b, ldb, c, ldc, add);
  }
  if constexpr (Rows > 1) {
    if (m > 0) rows_of<T, NV, Rows / 2>(m, depth, a, row_step, depth_step, b, ldb, c, ldc, add);
  }
}

/// C [m, n] = (or +=) A [m, depth] B [depth, n], C and B row-major, A by its two steps: (lda, 1)
/// for a row-major A, (1, lda) for the transpose of a row-major [depth, m].
template <class T>
void gemm(int64_t m, int64_t n, int64_t depth, const T* a, int64_t row_step, int64_t depth_step,
          const T* b, int64_t ldb, T* c, int64_t ldc, bool add = false) {
  constexpr int lanes = Vector<T>::lanes;
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    rows_of<T, 2>(m, depth, a, row_step, depth_step, b + j, ldb, c + j, ldc, add);
  }
  if (j + lanes <= n) {
    rows_of<T, 1>(m, depth, a, row_step, depth_step, b + j, ldb, c + j, ldc, add);
    j += lanes;
  }
  for (int64_t i = 0; i < m && j < n; ++i) {  // columns that do not fill a vector
    T* row = c + i * ldc;
    if (!add) std::memset(row + j, 0, static_cast<size_t>(n - j) * sizeof(T));
    for (int64_t p = 0; p < depth; ++p) {
      const T s = a[i * row_step + p * depth_step];
      for (int64_t x = j; x < n; ++x) row[x] += s * b[p * ldb + x];
    }
  }
}

/// out [cols, rows] = in [rows, cols]^T, converting; out's rows are ld_out apart.
template <class From, class To>
void transpose(int64_t rows, int64_t cols, const From* in, int64_t ld_in, To* out, int64_t ld_out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[j * ld_out + i] = static_cast<To>(in[i * ld_in + j]);
  }
}

}  // namespace entrain::tile
