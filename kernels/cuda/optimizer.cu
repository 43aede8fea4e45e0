// The norm of all gradients and AdamW, over the flat memory of all parameters.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int threads = 256;

// Sums of squares: as many blocks as an H100 holds, in strides; then one block adds theirs. The
// order is the same on every GPU.
constexpr int sum_blocks = 1056;
__device__ double partial_squares[sum_blocks];

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

template <int n>
__global__ void square_packs(const float* x, int64_t count) {
  __shared__ double shared[32];
  const auto* packs = reinterpret_cast<const Pack<float, n>*>(x);
  const int64_t whole = count / n, first = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = first; i < whole; i += sum_blocks * threads) {
    const Pack<float, n> a = packs[i];
    for (int e = 0; e < n; ++e) sum += static_cast<double>(a.at[e]) * a.at[e];
  }
  const int64_t rest = whole * n + first;
  if (rest < count) sum += static_cast<double>(x[rest]) * x[rest];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial_squares[blockIdx.x] = sum;
}

__global__ void sum_partial_squares(double* total) {
  __shared__ double shared[32];
  double sum = 0;
  for (int i = threadIdx.x; i < sum_blocks; i += threads) sum += partial_squares[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *total = sum;
}

// One block: the sum of a micro-batch's losses is not worth two launches.
__global__ void add_up(const float* x, int64_t count, double* total) {
  __shared__ double shared[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += x[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *total += sum;
}

/// AdamW's numbers of one step (Loshchilov and Hutter 2019, algorithm 2).
struct AdamWNumbers {
  float beta1, beta2, rest1, rest2, eps, g_scale, step, inverse_c2, keep;

  __device__ AdamWNumbers(const AdamW& a, const double* lr_c1_c2, double norm) {
    const double lr = lr_c1_c2[0], c1 = lr_c1_c2[1], c2 = lr_c1_c2[2];
    beta1 = static_cast<float>(a.beta1);
    beta2 = static_cast<float>(a.beta2);
    rest1 = static_cast<float>(1 - a.beta1);
    rest2 = static_cast<float>(1 - a.beta2);
    eps = static_cast<float>(a.eps);
    g_scale = a.clip > 0 && norm > a.clip ? static_cast<float>(a.clip / norm) : 1.f;
    step = static_cast<float>(lr / c1);
    inverse_c2 = static_cast<float>(1 / c2);
    keep = static_cast<float>(1 - lr * a.decay);
  }

  __device__ void update(float& w, float& g, float& m, float& v, bool decays) const {
    const float grad = g * g_scale;
    m = beta1 * m + rest1 * grad;
    v = beta2 * v + rest2 * grad * grad;
    w = (decays ? keep : 1.f) * w - step * m / (sqrtf(v * inverse_c2) + eps);
    g = 0;
  }
};

struct State {
  float *w, *g, *m, *v;
  const uint8_t* decays;
  bf16* rounded;  // or null
};

// A few blocks a multiprocessor, each thread packs of n parameters in strides: 16 bytes a tensor,
// 35 bytes of memory a parameter in all.
template <int n>
__global__ void adamw_packs(State s, const double* squares, const double* lr_c1_c2, AdamW adamw,
                            int64_t count) {
  const double norm = sqrt(*squares);
  if (!isfinite(norm)) return;
  const AdamWNumbers numbers(adamw, lr_c1_c2, norm);
  const int64_t whole = count / n, first = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * threads;
  using Floats = Pack<float, n>;
  for (int64_t i = first; i < whole; i += stride) {
    Floats w = reinterpret_cast<Floats*>(s.w)[i], g = reinterpret_cast<Floats*>(s.g)[i];
    Floats m = reinterpret_cast<Floats*>(s.m)[i], v = reinterpret_cast<Floats*>(s.v)[i];
    const auto decays = reinterpret_cast<const Pack<uint8_t, n>*>(s.decays)[i];
    Pack<bf16, n> rounded;
    for (int e = 0; e < n; ++e) {
      numbers.update(w.at[e], g.at[e], m.at[e], v.at[e], decays.at[e] != 0);
      rounded.at[e] = from_float<bf16>(w.at[e]);
    }
    reinterpret_cast<Floats*>(s.w)[i] = w;
    reinterpret_cast<Floats*>(s.g)[i] = g;
    reinterpret_cast<Floats*>(s.m)[i] = m;
    reinterpret_cast<Floats*>(s.v)[i] = v;
    if (s.rounded) reinterpret_cast<Pack<bf16, n>*>(s.rounded)[i] = rounded;
  }
  const int64_t rest = whole * n + first;
  if (rest >= count) return;
  numbers.update(s.w[rest], s.g[rest], s.m[rest], s.v[rest], s.decays[rest] != 0);
  if (s.rounded) s.rounded[rest] = from_float<bf16>(s.w[rest]);
}

}  // namespace

template <>
void Kernels<Device::cuda>::add_sum(Tensor x, Tensor sum) const {
  add_up<<<1, 1024, 0, stream()>>>(pointer<float>(x), x.numel(), pointer<double>(sum));
  check_launch("add_sum");
}

template <>
void Kernels<Device::cuda>::sum_of_squares(Tensor x, Tensor sum) const {
  const auto launch = [&]<int n>(std::integral_constant<int, n>) {
    square_packs<n><<<sum_blocks, threads, 0, stream()>>>(pointer<float>(x), x.numel());
  };
  aligned(x) ? launch(std::integral_constant<int, 4>{}) : launch(std::integral_constant<int, 1>{});
  sum_partial_squares<<<1, threads, 0, stream()>>>(pointer<double>(sum));
  check_launch("sum_of_squares");
}

template <>
void Kernels<Device::cuda>::adamw(Tensor w, Tensor g, Tensor m, Tensor v, Tensor decays,
                                  Tensor squares, const AdamW& adamw, Tensor rounded) const {
  const int64_t count = w.numel();
  if (count == 0) return;
  const State state{pointer<float>(w), pointer<float>(g),        pointer<float>(m),
                    pointer<float>(v), pointer<uint8_t>(decays), pointer<bf16>(rounded)};
  const double* lr_c1_c2 = on_device(adamw.lr_c1_c2, 3);
  const auto launch = [&]<int n>(std::integral_constant<int, n>) {
    const int64_t blocks = std::min<int64_t>(ceil_div(count, threads * n), 4 * multiprocessors());
    adamw_packs<n><<<static_cast<unsigned>(blocks), threads, 0, stream()>>>(
        state, pointer<double>(squares), lr_c1_c2, adamw, count);
  };
  aligned(w) && aligned(g) && aligned(m) && aligned(v) && aligned(decays) && aligned(rounded)
      ? launch(std::integral_constant<int, 4>{})
      : launch(std::integral_constant<int, 1>{});
  check_launch("adamw");
}

}  // namespace entrain
