// Whether the GPU is a Hopper, and maps for its copy engine. The driver makes them; it is asked for
// by name, so that the program starts where there is none.
#include "kernels/cuda/hopper.cuh"

namespace entrain::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#endif
  if (result != cudaDriverEntryPointSuccess || !found) {
    fail("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
  }
  return reinterpret_cast<Encode>(found);
}

}  // namespace

bool on_hopper() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability");
  return major == 9 && minor == 0;
}

CUtensorMap block_map(const Rows<bf16>& x, int64_t B, int64_t H, int64_t N, int64_t D) {
  static const Encode encode = find_encode();
  const auto number = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // The stride of a dimension of one is never used, yet checked.
  const auto stride = [&](int64_t step, int64_t count) {
    return number(2 * (count == 1 ? D : step));
  };
  const cuuint64_t extent[4] = {number(D), number(N), number(H), number(B)};
  const cuuint64_t strides[3] = {stride(x.token_step, N), stride(x.head_step, H),
                                 stride(x.batch_step, B)};
  const cuuint32_t box[4] = {64, block_rows, 1, 1}, every[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult made =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.data, extent, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made != CUDA_SUCCESS) {
    fail("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(made)));
  }
  return map;
}

}  // namespace entrain::cuda
