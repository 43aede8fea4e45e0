// alpha-entmax of rows as an operation of its own, for tests and other people's kernels to be held
// against. A warp takes a row, in double; forward keeps it in shared memory.
#include "kernels/cuda/entmax.cuh"

namespace entrain {
namespace {

using namespace cuda;

template <class T>
__global__ void entmax_row(const T* z, const int32_t* length, double alpha, T* p, int n) {
  extern __shared__ double scores[];
  const int lane = static_cast<int>(threadIdx.x), valid = length[blockIdx.x];
  z += static_cast<int64_t>(blockIdx.x) * n;
  p += static_cast<int64_t>(blockIdx.x) * n;
  for (int c = valid + lane; c < n; c += 32) p[c] = from_float<T>(0);
  if (valid == 0) return;
  for (int c = lane; c < valid; c += 32) scores[c] = to_float(z[c]);
  __syncwarp();
  const double top = entmax_shift(scores, valid);
  const double tau = entmax_threshold(scores, valid, alpha, scores);
  for (int c = lane; c < valid; c += 32) {
    p[c] = static_cast<T>(entmax_probability(to_float(z[c]) - top, tau, alpha));
  }
}

template <class T>
__global__ void entmax_row_backward(const T* p, const T* dp, double alpha, T* dz, int n) {
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  double total = 0, weighted = 0;
  for (int c = lane; c < n; c += 32) {
    const double s = entmax_slope(to_float(p[row + c]), alpha);
    total += s;
    weighted += s * to_float(dp[row + c]);
  }
  total = warp_sum(total);
  weighted = warp_sum(weighted);
  const double mean = total > 0 ? weighted / total : 0;
  for (int c = lane; c < n; c += 32) {
    const double s = entmax_slope(to_float(p[row + c]), alpha);
    dz[row + c] = static_cast<T>(s * (to_float(dp[row + c]) - mean));
  }
}

}  // namespace

template <>
void Kernels<Device::cuda>::entmax(Tensor z, Tensor length, double alpha, Tensor p) const {
  if (z.numel() == 0) return;
  const size_t shared = static_cast<size_t>(z[1]) * sizeof(double);
  by_type(z, [&]<class T>(T) {
    check(cudaFuncSetAttribute(entmax_row<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "the shared memory of a row of entmax");
    entmax_row<<<static_cast<unsigned>(z[0]), 32, shared, stream()>>>(
        pointer<T>(z), pointer<int32_t>(length), alpha, pointer<T>(p), static_cast<int>(z[1]));
  });
  check_launch("entmax");
}

template <>
void Kernels<Device::cuda>::entmax_backward(Tensor p, Tensor dp, double alpha, Tensor dz) const {
  if (p.numel() == 0) return;
  by_type(p, [&]<class T>(T) {
    entmax_row_backward<<<static_cast<unsigned>(p[0]), 32, 0, stream()>>>(
        pointer<T>(p), pointer<T>(dp), alpha, pointer<T>(dz), static_cast<int>(p[1]));
  });
  check_launch("entmax_backward");
}

}  // namespace entrain
