// y = silu(gate) up (Shazeer 2020), silu(a) = a / (1 + e^-a).
//
// A thread takes a pack of 16 bytes of a row of y and its partners in gate and up: forward reads
// two and writes one, backward reads three and writes two. Memory bounds both.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int threads = 256;

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.f, 1.f + expf(-x));
}

/// Where pack `item` of y lies in gate_up, whose rows hold `width` packs of gate, then of up.
__device__ __forceinline__ int64_t gate_of(int64_t item, int width) {
  return item + item / width * width;
}

template <class T, int n>
__global__ void swiglu_packs(const Pack<T, n>* gate_up, Pack<T, n>* y, int64_t count, int width) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= count) return;
  const int64_t at = gate_of(item, width);
  const Pack<T, n> gate = gate_up[at], up = gate_up[at + width];
  Pack<T, n> out;
  for (int e = 0; e < n; ++e) {
    const float g = to_float(gate.at[e]);
    out.at[e] = from_float<T>(g * sigmoid(g) * to_float(up.at[e]));
  }
  y[item] = out;
}

template <class T, int n>
__global__ void swiglu_packs_backward(const Pack<T, n>* dy, const Pack<T, n>* gate_up,
                                      Pack<T, n>* dgate_up, int64_t count, int width) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (item >= count) return;
  const int64_t at = gate_of(item, width);
  const Pack<T, n> dout = dy[item], gate = gate_up[at], up = gate_up[at + width];
  Pack<T, n> dgate, dup;
  for (int e = 0; e < n; ++e) {
    const float g = to_float(gate.at[e]), d = to_float(dout.at[e]);
    const float s = sigmoid(g), silu = g * s;
    dup.at[e] = from_float<T>(d * silu);
    dgate.at[e] = from_float<T>(d * to_float(up.at[e]) * (s + silu * (1 - s)));
  }
  dgate_up[at] = dgate;
  dgate_up[at + width] = dup;
}

}  // namespace

template <>
void Kernels<Device::cuda>::swiglu(Tensor gate_up, Tensor y) const {
  if (y.numel() == 0) return;
  by_type(y, [&]<class T>(T) {
    by_pack<T>({y, gate_up}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = y.numel() / n;
      swiglu_packs<T, n><<<static_cast<unsigned>(ceil_div(count, threads)), threads, 0, stream()>>>(
          packs<T, n>(gate_up), packs<T, n>(y), count, static_cast<int>(y[1] / n));
    });
  });
  check_launch("swiglu");
}

template <>
void Kernels<Device::cuda>::swiglu_backward(Tensor dy, Tensor gate_up, Tensor dgate_up) const {
  if (dy.numel() == 0) return;
  by_type(dy, [&]<class T>(T) {
    by_pack<T>({dy, gate_up, dgate_up}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = dy.numel() / n;
      swiglu_packs_backward<T, n>
          <<<static_cast<unsigned>(ceil_div(count, threads)), threads, 0, stream()>>>(
              packs<T, n>(dy), packs<T, n>(gate_up), packs<T, n>(dgate_up), count,
              static_cast<int>(dy[1] / n));
    });
  });
  check_launch("swiglu_backward");
}

}  // namespace entrain
