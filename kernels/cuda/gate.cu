// Gates: one number in (0, 1) a query and head, which scales what a branch hands it.
//
// Gates themselves are small, a thread takes one. Of rows that they scale, a thread takes a pack of
// 16 bytes, and a power of two of neighbouring threads shares a row where it is summed. Memory
// bounds all of it.
#include <bit>

#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int threads = 256;

// The gradient of biases: each head's tokens in a fixed number of parts, whose sums lie here.
constexpr int64_t most_partials = 1 << 16;
__device__ float partial_dbias[most_partials];  // [H][parts]

/// Blocks of threads that take so many items, one each.
unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(ceil_div(items, threads));
}

__device__ __forceinline__ int64_t item_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
}

/// A row (b, h, i) of [B, H, N], as `row` counts them.
struct Place {
  int64_t b, h, i;

  __device__ Place(int64_t row, int64_t H, int64_t N) {
    const int64_t head = row / N;
    i = row - head * N;
    b = head / H;
    h = head - b * H;
  }
};

template <class T>
__device__ __forceinline__ T& element(Rows<T> x, const Place& at) {
  return *x.at(at.b, at.h, at.i);
}

template <int n, class T>
__device__ __forceinline__ Pack<T, n>* packs_at(Rows<T> x, const Place& at) {
  return reinterpret_cast<Pack<T, n>*>(x.at(at.b, at.h, at.i));
}

template <class T>
__global__ void open_gates(Rows<T> x, const float* bias, Rows<T> gate, int64_t H, int64_t N,
                           int64_t rows) {
  const int64_t row = item_of_thread();
  if (row >= rows) return;
  const Place at(row, H, N);
  element(gate, at) = from_float<T>(1 / (1 + expf(-(to_float(element(x, at)) + bias[at.h]))));
}

// Block (part, h) takes `stretch` of the B N tokens of a head.
template <class T>
__global__ void open_gates_backward(Rows<T> dgate, Rows<T> gate, Rows<T> dx, int64_t N,
                                    int64_t tokens, int64_t stretch) {
  __shared__ float shared[32];
  const int64_t begin = blockIdx.x * stretch, end = min(tokens, begin + stretch);
  float sum = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += threads) {
    Place at(t, 1, N);
    at.h = blockIdx.y;
    const float g = to_float(element(gate, at));
    const float d = to_float(element(dgate, at)) * g * (1 - g);
    element(dx, at) = from_float<T>(d);
    sum += d;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial_dbias[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// A warp a head.
__global__ void add_dbias(float* dbias, int parts) {
  float sum = 0;
  for (int i = threadIdx.x; i < parts; i += 32) sum += partial_dbias[blockIdx.x * parts + i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) dbias[blockIdx.x] += sum;
}

template <class T, int n>
__global__ void scale_packs(Rows<T> x, Rows<T> gate, bool add, Rows<T> y, int64_t H, int64_t N,
                            int width, int64_t count) {
  const int64_t item = item_of_thread();
  if (item >= count) return;
  const int64_t row = item / width, p = item - row * width;
  const Place at(row, H, N);
  const float g = to_float(element(gate, at));
  const Pack<T, n> in = packs_at<n>(x, at)[p];
  Pack<T, n>& to = packs_at<n>(y, at)[p];
  Pack<T, n> out = add ? to : Pack<T, n>{};
  for (int e = 0; e < n; ++e) {
    out.at[e] = from_float<T>(to_float(out.at[e]) + g * to_float(in.at[e]));
  }
  to = out;
}

template <class T, int n>
__global__ void scale_packs_backward(Rows<T> dy, Rows<T> x, Rows<T> gate, Rows<T> dx, Rows<T> dgate,
                                     int64_t H, int64_t N, int width, int lanes, int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = item_of_thread() / lanes;
  const Place at(min(row, rows - 1), H, N);  // all threads take part in the sum
  const float g = to_float(element(gate, at));
  float dot = 0;
  for (int p = lane; p < width && row < rows; p += lanes) {
    const Pack<T, n> dout = packs_at<n>(dy, at)[p], in = packs_at<n>(x, at)[p];
    Pack<T, n> out;
    for (int e = 0; e < n; ++e) {
      dot += to_float(dout.at[e]) * to_float(in.at[e]);
      out.at[e] = from_float<T>(g * to_float(dout.at[e]));
    }
    packs_at<n>(dx, at)[p] = out;
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, offset);
  }
  if (lane == 0 && row < rows) element(dgate, at) = from_float<T>(dot);
}

}  // namespace

template <>
void Kernels<Device::cuda>::gate(Tensor x, Tensor bias, Tensor gate) const {
  if (gate.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    open_gates<<<blocks_for(gate.numel()), threads, 0, stream()>>>(
        Rows<T>(x), pointer<float>(bias), Rows<T>(gate), gate[1], gate[2], gate.numel());
  });
  check_launch("gate");
}

template <>
void Kernels<Device::cuda>::gate_backward(Tensor dgate, Tensor gate, Tensor dx,
                                          Tensor dbias_sum) const {
  if (gate.numel() == 0) return;
  const int64_t H = gate[1], tokens = gate[0] * gate[2];
  if (H > most_partials) fail("gates of " + std::to_string(H) + " heads");
  const int64_t parts = std::min<int64_t>({64, most_partials / H, ceil_div(tokens, threads)});
  const auto heads = static_cast<unsigned>(H);
  by_type(gate, [&]<class T>(T) {
    open_gates_backward<<<dim3(static_cast<unsigned>(parts), heads), threads, 0, stream()>>>(
        Rows<T>(dgate), Rows<T>(gate), Rows<T>(dx), gate[2], tokens, ceil_div(tokens, parts));
  });
  add_dbias<<<heads, 32, 0, stream()>>>(pointer<float>(dbias_sum), static_cast<int>(parts));
  check_launch("gate_backward");
}

template <>
void Kernels<Device::cuda>::scale_rows(Tensor x, Tensor gate, bool add, Tensor y) const {
  if (x.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    by_pack<T>({x, y}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = x.numel() / n;
      scale_packs<T, n><<<blocks_for(count), threads, 0, stream()>>>(
          Rows<T>(x), Rows<T>(gate), add, Rows<T>(y), x[1], x[2], static_cast<int>(x[3] / n),
          count);
    });
  });
  check_launch("scale_rows");
}

template <>
void Kernels<Device::cuda>::scale_rows_backward(Tensor dy, Tensor x, Tensor gate, Tensor dx,
                                                Tensor dgate) const {
  if (x.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    by_pack<T>({dy, x, dx}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t rows = gate.numel();
      const auto width = static_cast<unsigned>(x[3] / n);
      const unsigned lanes = std::bit_ceil(std::min(width, 32u));
      scale_packs_backward<T, n><<<blocks_for(rows * lanes), threads, 0, stream()>>>(
          Rows<T>(dy), Rows<T>(x), Rows<T>(gate), Rows<T>(dx), Rows<T>(dgate), x[1], x[2],
          static_cast<int>(width), static_cast<int>(lanes), rows);
    });
  });
  check_launch("scale_rows_backward");
}

}  // namespace entrain
