#pragma once
// The BLAS calls of the project, by their Fortran names: every BLAS has them.
#include <cstdint>

extern "C" {
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc);
void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
            const double* beta, double* c, const int* ldc);
void sgemv_(const char* trans, const int* m, const int* n, const float* alpha, const float* a,
            const int* lda, const float* x, const int* incx, const float* beta, float* y,
            const int* incy);
void dgemv_(const char* trans, const int* m, const int* n, const double* alpha, const double* a,
            const int* lda, const double* x, const int* incx, const double* beta, double* y,
            const int* incy);
}

namespace entrain {

/// Row-major C [m, n] = op(A) op(B) + beta C, op the transpose where asked; leading dimensions in
/// elements.
template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
          int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  // Column-major BLAS sees every row-major matrix transposed: compute C^T = op(B)^T op(A)^T.
  const int im = static_cast<int>(n), in = static_cast<int>(m), ik = static_cast<int>(k);
  const int ia = static_cast<int>(ldb), ib = static_cast<int>(lda), ic = static_cast<int>(ldc);
  const char* op_a = transpose_b ? "T" : "N";
  const char* op_b = transpose_a ? "T" : "N";
  const T one = 1;
  if constexpr (sizeof(T) == sizeof(float)) {
    sgemm_(op_a, op_b, &im, &in, &ik, &one, b, &ia, a, &ib, &beta, c, &ic);
  } else {
    dgemm_(op_a, op_b, &im, &in, &ik, &one, b, &ia, a, &ib, &beta, c, &ic);
  }
}

/// y [m] = A [m, n] x [n] + beta y, A row-major.
template <class T>
void gemv(int64_t m, int64_t n, const T* a, const T* x, T beta, T* y) {
  const int rows = static_cast<int>(n), columns = static_cast<int>(m), step = 1;  // BLAS sees A^T
  const T one = 1;
  if constexpr (sizeof(T) == sizeof(float)) {
    sgemv_("T", &rows, &columns, &one, a, &rows, x, &step, &beta, y, &step);
  } else {
    dgemv_("T", &rows, &columns, &one, a, &rows, x, &step, &beta, y, &step);
  }
}

}  // namespace entrain
