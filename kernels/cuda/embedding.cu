// y[t] = w[tokens[t]], and its gradient, whose sums have a fixed order without float atomics:
//
// 1. Tokens are sorted by id; equal ids keep their order (CUB's radix sort of 64-bit keys).
// 2. Runs of one id within a window of 256 sorted tokens are summed, each by one block that reads
//    dy's rows in order. A run that lies within the window is added to its row of dw at once. One
//    that a border breaks, which is how a frequent id is shared out, leaves its sum in `broken`:
//    a window has two of those at most, its first run and its last.
// 3. Blocks add up the parts of each broken run, in order, and add that to dw.
//
// Memory sees dy once, and the rows of dw of the ids that occur once to read and once to write.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int window = 256;  // sorted tokens
constexpr int group = 16;    // of them, those whose runs a block sums
constexpr int batch = 4;     // rows of dy that a thread has in flight

// Tokens are handled so many at a time, fewer where d is so large that `broken` would not do.
constexpr int64_t most_tokens = 1 << 16;
constexpr int64_t most_broken = 1 << 20;
__device__ uint64_t keys[2][most_tokens];                 // id, then position: to sort and sorted
__device__ __align__(32) float broken_sums[most_broken];  // [window][2][d]
__device__ uint8_t sort_scratch[1 << 20];

/// Where a variable of the device lies.
template <class T>
T* address(const void* symbol) {
  void* at = nullptr;
  check(cudaGetSymbolAddress(&at, symbol), "the embedding's scratch");
  return static_cast<T*>(at);
}

__device__ __forceinline__ uint32_t id_of(uint64_t key) {
  return static_cast<uint32_t>(key >> 32);
}

template <class T, int n>
__global__ void gather_rows(const int32_t* tokens, const Pack<T, n>* w, Pack<T, n>* y,
                            int64_t count, int width) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= count) return;
  const int64_t t = item / width;
  y[item] = w[tokens[t] * static_cast<int64_t>(width) + (item - t * width)];
}

__global__ void make_keys(const int32_t* tokens, int count, uint64_t* keys) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (t < count) keys[t] = static_cast<uint64_t>(tokens[t]) << 32 | static_cast<uint32_t>(t);
}

// A block takes the runs that begin in its group of sorted tokens, a thread a pack of columns.
template <class T, int n>
__global__ void sum_runs(const uint64_t* sorted, int count, const Pack<T, n>* __restrict__ dy,
                         int width, Pack<float, n>* dw, Pack<float, n>* broken) {
  // Keys from the one before the group to the one after the window. Ids are below 2^31, so `none`
  // is unlike all.
  constexpr uint64_t none = ~uint64_t{0};
  __shared__ uint64_t key[window + 2];
  const int begin = static_cast<int>(blockIdx.x) * group;
  const int border = min(count, (begin / window + 1) * window);
  for (int i = threadIdx.x; i < border - begin + 2; i += blockDim.x) {
    const int at = begin - 1 + i;
    key[i] = at < 0 || at >= count ? none : sorted[at];
  }
  __syncthreads();
  const int p = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (p >= width) return;

  const int stop = border - begin;
  for (int i = 0, end; i < min(group, stop); i = end) {
    const uint32_t id = id_of(key[i + 1]);
    for (end = i + 1; end < stop && id_of(key[end + 1]) == id; ++end) {
    }
    const bool begun_before = id_of(key[i]) == id;
    if (begun_before && (begin + i) % window != 0) continue;  // another group's
    const bool goes_on = end == stop && id_of(key[stop + 1]) == id;
    const bool whole = !begun_before && !goes_on;
    Pack<float, n>* to = whole ? dw + static_cast<int64_t>(id) * width
                               : broken + (begin / window * 2 + (begun_before ? 0 : 1)) * width;
    const Pack<float, n> before = whole ? to[p] : Pack<float, n>{};
    Pack<float, n> sum = {};
    for (int j = i; j < end; j += batch) {
      Pack<T, n> row[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t t = static_cast<uint32_t>(key[min(j + k, end - 1) + 1]);
        row[k] = dy[t * width + p];
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        for (int e = 0; j + k < end && e < n; ++e) sum.at[e] += to_float(row[k].at[e]);
      }
    }
    for (int e = 0; e < n; ++e) sum.at[e] += before.at[e];
    to[p] = sum;
  }
}

// A block takes the run that begins in its window and is broken by its end, if there is one.
template <int n>
__global__ void join_runs(const uint64_t* sorted, int count, const Pack<float, n>* broken,
                          int width, Pack<float, n>* dw) {
  const int at = static_cast<int>(blockIdx.x), begin = at * window, end = begin + window;
  if (end >= count) return;
  const uint32_t id = id_of(sorted[end - 1]);
  if (id_of(sorted[end]) != id || (begin > 0 && id_of(sorted[begin - 1]) == id)) return;
  int more = 0;  // windows that begin with it
  for (int first = end; first < count; first += static_cast<int>(blockDim.x) * window) {
    const int64_t other = first + static_cast<int64_t>(threadIdx.x) * window;
    more += __syncthreads_count(other < count && id_of(sorted[other]) == id);
  }
  const int p = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (p >= width) return;
  Pack<float, n> sum = broken[(2 * at + 1) * width + p];
#pragma unroll 4
  for (int i = 1; i <= more; ++i) {
    const Pack<float, n> part = broken[2 * (at + i) * width + p];
    for (int e = 0; e < n; ++e) sum.at[e] += part.at[e];
  }
  Pack<float, n>& row = dw[static_cast<int64_t>(id) * width + p];
  for (int e = 0; e < n; ++e) sum.at[e] += row.at[e];
  row = sum;
}

/// Keys of up to most_tokens tokens, sorted by id.
const uint64_t* sort_tokens(const int32_t* tokens, int count, int64_t vocabulary) {
  auto* both = address<uint64_t>(keys);
  make_keys<<<static_cast<unsigned>(ceil_div(count, 256)), 256, 0, stream()>>>(tokens, count, both);
  cub::DoubleBuffer<uint64_t> buffer(both, both + most_tokens);
  const int bits =
      std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(vocabulary - 1))));
  size_t bytes = 0;
  const auto sort = [&](void* scratch) {
    check(cub::DeviceRadixSort::SortKeys(scratch, bytes, buffer, count, 32, 32 + bits, stream()),
          "the sort of tokens");
  };
  sort(nullptr);  // only asks for bytes
  if (bytes > sizeof(sort_scratch)) {
    fail("the sort of " + std::to_string(count) + " tokens needs " + std::to_string(bytes) +
         " bytes of scratch");
  }
  sort(address<void>(sort_scratch));
  return buffer.Current();
}

}  // namespace

template <>
void Kernels<Device::cuda>::embedding(Tensor tokens, Tensor w, Tensor y) const {
  if (y.numel() == 0) return;
  by_type(w, [&]<class T>(T) {
    by_pack<T>({w, y}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = y.numel() / n;
      gather_rows<T, n><<<static_cast<unsigned>(ceil_div(count, 256)), 256, 0, stream()>>>(
          pointer<int32_t>(tokens), packs<T, n>(w), packs<T, n>(y), count,
          static_cast<int>(w[1] / n));
    });
  });
  check_launch("embedding");
}

template <>
void Kernels<Device::cuda>::embedding_backward(Tensor tokens, Tensor dy, Tensor dw_sum) const {
  const int64_t T = tokens.numel(), d = dw_sum[1];
  const int64_t step = std::min(most_tokens, most_broken / (2 * d) * window);
  if (step == 0) fail("the gradient of embeddings of " + std::to_string(d) + " elements");
  auto* broken = address<float>(broken_sums);
  for (int64_t begin = 0; begin < T; begin += step) {
    const auto count = static_cast<int>(std::min(step, T - begin));
    const uint64_t* sorted = sort_tokens(pointer<int32_t>(tokens) + begin, count, dw_sum[0]);
    by_type(dy, [&]<class Real>(Real) {
      by_pack<Real>({dy, dw_sum}, [&]<int n>(std::integral_constant<int, n>) {
        const int64_t width = d / n, threads = std::min<int64_t>(ceil_div(width, 32) * 32, 256);
        const auto block = static_cast<unsigned>(threads);
        const auto columns = static_cast<unsigned>(ceil_div(width, threads));
        auto* dw = packs<float, n>(dw_sum);
        auto* parts = reinterpret_cast<Pack<float, n>*>(broken);
        sum_runs<Real, n>
            <<<dim3(static_cast<unsigned>(ceil_div(count, group)), columns), block, 0, stream()>>>(
                sorted, count, packs<Real, n>(dy) + begin * width, static_cast<int>(width), dw,
                parts);
        join_runs<n>
            <<<dim3(static_cast<unsigned>(ceil_div(count, window)), columns), block, 0, stream()>>>(
                sorted, count, parts, static_cast<int>(width), dw);
      });
    });
    check_launch("embedding_backward");
  }
}

}  // namespace entrain
