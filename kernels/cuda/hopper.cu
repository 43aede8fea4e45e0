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

/// A dimension outside the columns, and how much of it a box takes.
struct Dimension {
  int64_t count, step, box;
};

CUtensorMap map_of(const Rows<bf16>& x, int64_t D, const Dimension (&outer)[3]) {
  static const Encode encode = find_encode();
  const auto number = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  cuuint64_t extent[4] = {number(D)}, strides[3];
  cuuint32_t box[4] = {64};
  for (int i = 0; i < 3; ++i) {
    extent[i + 1] = number(outer[i].count);
    // The stride of a dimension of one is never used, yet checked.
    strides[i] = number(2 * (outer[i].count == 1 ? D : outer[i].step));
    box[i + 1] = static_cast<cuuint32_t>(outer[i].box);
  }
  const cuuint32_t every[4] = {1, 1, 1, 1};
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

}  // namespace

bool on_hopper() {
  static const bool is = [] {
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability");
    return major == 9 && minor == 0;
  }();
  return is;
}

CUtensorMap block_map(const Rows<bf16>& x, int64_t B, int64_t H, int64_t N, int64_t D) {
  return map_of(x, D, {{N, x.token_step, block_rows}, {H, x.head_step, 1}, {B, x.batch_step, 1}});
}

CUtensorMap packed_map(const Rows<bf16>& x, int64_t B, int64_t H, int64_t N, int64_t D, int heads,
                       int tokens) {
  return map_of(x, D, {{H, x.head_step, heads}, {N, x.token_step, tokens}, {B, x.batch_step, 1}});
}

}  // namespace entrain::cuda
