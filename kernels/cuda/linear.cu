// Products with weights, by cuBLASLt: bf16 (or f32) in, f32 accumulation. Its first choice of an
// algorithm for a product is kept, so that every run of a program computes the same bits; schemes
// that sum parts of a product in an order left to chance are not allowed.
#include <cublasLt.h>

#include <array>
#include <map>
#include <tuple>

#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using cuda::bf16;

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    cuda::fail(std::string("cuBLASLt: ") + what + ": " + cublasLtGetStatusString(status));
  }
}

/// D = op(A) op(B) + beta C of column-major matrices: D, C [m, n], op(A) [m, k], op(B) [k, n].
/// Row-major matrices are these, transposed.
struct Product {
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  cudaDataType_t in, out;
  float beta;

  auto key() const { return std::tuple(transpose_a, transpose_b, m, n, k, in, out, beta); }
};

/// What is made once for a product.
struct Plan {
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulAlgo_t algorithm;
};

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  uint32_t alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

/// The library, its workspace, and the plans so far.
class Library {
 public:
  static Library& get() {
    static Library library;
    return library;
  }

  void run(const Product& p, const void* a, const void* b, const void* c, void* d) {
    const float one = 1;
    const Plan& plan = plan_of(p, a, b, c, d);
    check(cublasLtMatmul(handle_, plan.product, &one, a, plan.a, b, plan.b, &p.beta, c, plan.d, d,
                         plan.d, &plan.algorithm, workspace_, workspace_bytes, cuda::stream()),
          "a matrix product");
  }

 private:
  static constexpr size_t workspace_bytes = size_t{32} << 20;  // what NVIDIA advises for Hopper

  Library() {
    check(cublasLtCreate(&handle_), "start");
    cuda::check(cudaMalloc(&workspace_, workspace_bytes), "cudaMalloc");
  }

  using Alignments = std::array<uint32_t, 4>;

  const Plan& plan_of(const Product& p, const void* a, const void* b, const void* c,
                      const void* d) {
    const Alignments at{alignment_of(a), alignment_of(b), alignment_of(c), alignment_of(d)};
    const auto [it, fresh] = plans_.try_emplace(std::tuple(p.key(), at));
    if (fresh) it->second = make(p, at);
    return it->second;
  }

  Plan make(const Product& p, const Alignments& at) {
    Plan plan{};
    check(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, cublasOperation_t value) {
      check(cublasLtMatmulDescSetAttribute(plan.product, attribute, &value, sizeof value),
            "descriptor");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    const auto layout = [&](cudaDataType_t type, bool transposed, int64_t rows, int64_t columns) {
      if (transposed) std::swap(rows, columns);
      cublasLtMatrixLayout_t created;
      check(cublasLtMatrixLayoutCreate(&created, type, static_cast<uint64_t>(rows),
                                       static_cast<uint64_t>(columns), rows),
            "layout");
      return created;
    };
    plan.a = layout(p.in, p.transpose_a, p.m, p.k);
    plan.b = layout(p.in, p.transpose_b, p.k, p.n);
    plan.d = layout(p.out, false, p.m, p.n);

    cublasLtMatmulPreference_t preference;
    check(cublasLtMatmulPreferenceCreate(&preference), "preference");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
            "preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, at[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, at[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, at[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, at[3]);
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle_, plan.product, plan.a, plan.b, plan.d, plan.d, preference, 1, &found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
      cuda::fail("cuBLASLt has no algorithm for a product of " + std::to_string(p.m) + " x " +
                 std::to_string(p.n) + " x " + std::to_string(p.k));
    }
    plan.algorithm = found.algo;
    return plan;
  }

  cublasLtHandle_t handle_;
  void* workspace_;
  std::map<std::tuple<decltype(Product{}.key()), Alignments>, Plan> plans_;
};

template <class T>
constexpr cudaDataType_t cuda_type = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;

}  // namespace

template <>
void Kernels<Device::cuda>::linear(Tensor x, Tensor w, Tensor y, Tensor base) const {
  cuda::by_type(x, [&](auto t) {
    using T = decltype(t);
    const int64_t count = x[0], in = w[1], out = w[0];
    if (count == 0) return;
    const T* c = cuda::pointer<T>(base ? base : y);
    const float beta = base ? 1.0f : 0.0f;
    // y^T [out, T] = w [in, out]^T x [in, T], in the library's column-major eyes.
    Library::get().run({true, false, out, count, in, cuda_type<T>, cuda_type<T>, beta},
                       cuda::pointer<T>(w), cuda::pointer<T>(x), c, cuda::pointer<T>(y));
  });
}

template <>
void Kernels<Device::cuda>::linear_backward(Tensor dy, Tensor x, Tensor w, Tensor dx,
                                            Tensor dw_sum) const {
  cuda::by_type(x, [&](auto t) {
    using T = decltype(t);
    const int64_t count = x[0], in = w[1], out = w[0];
    if (count == 0) return;
    const T* dyp = cuda::pointer<T>(dy);
    // dw^T [in, out] += x [in, T] dy [out, T]^T; dx^T [in, T] = w [in, out] dy [out, T].
    float* dw = cuda::pointer<float>(dw_sum);
    Library::get().run({false, true, in, out, count, cuda_type<T>, CUDA_R_32F, 1.0f},
                       cuda::pointer<T>(x), dyp, dw, dw);
    T* dxp = cuda::pointer<T>(dx);
    Library::get().run({false, false, in, count, out, cuda_type<T>, cuda_type<T>, 0.0f},
                       cuda::pointer<T>(w), dyp, dxp, dxp);
  });
}

}  // namespace entrain
