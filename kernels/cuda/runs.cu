// Runs of tokens: their means, their rows side by side, and the way back; and sums over rows. Runs
// may overlap, and tokens may belong to none.
//
// A thread takes a pack of 16 bytes of what is written, and sums in f32 (f64 where means are f64).
// Memory sees each tensor about once: runs that overlap meet in the caches.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

constexpr int threads = 256;

/// Blocks of threads that take so many items, one each.
unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(ceil_div(items, threads));
}

__device__ __forceinline__ int64_t item_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
}

/// Pack p of row (b, h, i) of [B, H, N, width], as an item counts them.
struct Place {
  int64_t row, b, h, i;
  int p;

  __device__ Place(int64_t item, int64_t H, int64_t N, int width) : row(item / width) {
    p = static_cast<int>(item - row * width);
    const int64_t head = row / N;
    i = row - head * N;
    b = head / H;
    h = head - b * H;
  }
};

template <int n, class T>
__device__ __forceinline__ Pack<T, n>* packs_at(T* row) {
  return reinterpret_cast<Pack<T, n>*>(row);
}

template <class T, class P, int n>
__global__ void pool(Rows<T> x, Runs runs, Rows<P> pooled, int64_t H, int64_t W, int width,
                     int64_t count) {
  using Sum = std::conditional_t<std::is_same_v<P, double>, double, float>;
  const int64_t item = item_of_thread();
  if (item >= count) return;
  const Place at(item, H, W, width);
  T* token = x.at(at.b, at.h, at.i * runs.stride);
  Sum sum[n] = {};
#pragma unroll 4
  for (int64_t t = 0; t < runs.length; ++t) {
    const Pack<T, n> in = packs_at<n>(token + t * x.token_step)[at.p];
    for (int e = 0; e < n; ++e) sum[e] += to_float(in.at[e]);
  }
  const Sum scale = 1 / static_cast<Sum>(runs.length);
  Pack<P, n> mean;
  for (int e = 0; e < n; ++e) mean.at[e] = static_cast<P>(sum[e] * scale);
  packs_at<n>(pooled.at(at.b, at.h, at.i))[at.p] = mean;
}

// rows [B H W][length][width] of packs.
template <class T, int n>
__global__ void unfold(Rows<T> x, Runs runs, const Pack<T, n>* offset, Pack<T, n>* rows, int64_t H,
                       int64_t W, int width, int64_t count) {
  const int64_t item = item_of_thread();
  if (item >= count) return;
  const Place at(item / width, H, W, static_cast<int>(runs.length));  // p: the token in the run
  const int p = static_cast<int>(item % width);
  Pack<T, n> out = packs_at<n>(x.at(at.b, at.h, at.i * runs.stride + at.p))[p];
  if (offset) {
    const Pack<T, n> plus = offset[at.p * width + p];
    for (int e = 0; e < n; ++e) {
      out.at[e] = from_float<T>(to_float(out.at[e]) + to_float(plus.at[e]));
    }
  }
  rows[item] = out;
}

template <class T, int n>
__global__ void fold(const Pack<T, n>* drows, const Pack<T, n>* dpooled, Runs runs, Rows<T> dx,
                     int64_t H, int64_t N, int64_t W, int width, int64_t count) {
  const int64_t item = item_of_thread();
  if (item >= count) return;
  const Place at(item, H, N, width);
  const int64_t first = at.row / N * W;  // run of this head
  const float scale = 1 / static_cast<float>(runs.length);
  float sum[n] = {};
  // Runs that hold token i: those begun by it that did not end before it.
  const int64_t begin = at.i < runs.length ? 0 : (at.i - runs.length) / runs.stride + 1;
  const int64_t end = min(W, at.i / runs.stride + 1);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t run = first + m;
    const Pack<T, n> mean = dpooled[run * width + at.p];
    for (int e = 0; e < n; ++e) sum[e] += scale * to_float(mean.at[e]);
    if (!drows) continue;
    const Pack<T, n> own = drows[(run * runs.length + at.i - m * runs.stride) * width + at.p];
    for (int e = 0; e < n; ++e) sum[e] += to_float(own.at[e]);
  }
  Pack<T, n> out;
  for (int e = 0; e < n; ++e) out.at[e] = from_float<T>(sum[e]);
  packs_at<n>(dx.at(at.b, at.h, at.i))[at.p] = out;
}

// Sums over rows: a block takes 8 packs of columns of a stretch of rows, 32 rows at a time, and
// writes or adds the sums of that stretch. Many rows take two rounds, by way of partial_rows.
constexpr int column_packs = 8, row_lanes = 32;
constexpr int64_t most_partials = 1 << 20;
__device__ __align__(32) float partial_rows[most_partials];

template <class T, int n>
__global__ void sum_columns(const Pack<T, n>* x, int64_t rows, int width, int64_t stretch,
                            float* to, bool add) {
  __shared__ Pack<float, n> sums[row_lanes][column_packs];
  const int p = static_cast<int>(blockIdx.x) * column_packs + threadIdx.x;
  const int64_t begin = blockIdx.y * stretch, end = min(rows, begin + stretch);
  Pack<float, n> sum = {};
  if (p < width) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += row_lanes) {
      const Pack<T, n> a = x[row * width + p];
      for (int e = 0; e < n; ++e) sum.at[e] += to_float(a.at[e]);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  const int c = static_cast<int>(threadIdx.y * column_packs + threadIdx.x);
  const int column = static_cast<int>(blockIdx.x) * column_packs * n + c, columns = width * n;
  if (c >= column_packs * n || column >= columns) return;
  float total = 0;
  for (int i = 0; i < row_lanes; ++i) total += sums[i][c / n].at[c % n];
  float& out = to[static_cast<int64_t>(blockIdx.y) * columns + column];
  out = add ? out + total : total;
}

}  // namespace

template <>
void Kernels<Device::cuda>::pool_runs(Tensor x, Runs runs, Tensor pooled) const {
  if (pooled.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    by_pack<T>({x, pooled}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = pooled.numel() / n;
      const auto launch = [&]<class P>(P) {
        pool<T, P, n><<<blocks_for(count), threads, 0, stream()>>>(
            Rows<T>(x), runs, Rows<P>(pooled), x[1], pooled[2], static_cast<int>(x[3] / n), count);
      };
      pooled.dtype == DType::f64 ? launch(double{}) : launch(T{});
    });
  });
  check_launch("pool_runs");
}

template <>
void Kernels<Device::cuda>::unfold_runs(Tensor x, Runs runs, Tensor offset, Tensor rows) const {
  if (rows.numel() == 0) return;
  by_type(x, [&]<class T>(T) {
    by_pack<T>({x, offset ? offset : rows, rows}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = rows.numel() / n;
      unfold<T, n><<<blocks_for(count), threads, 0, stream()>>>(
          Rows<T>(x), runs, packs<T, n>(offset), packs<T, n>(rows), x[1], runs.within(x[2]),
          static_cast<int>(x[3] / n), count);
    });
  });
  check_launch("unfold_runs");
}

template <>
void Kernels<Device::cuda>::fold_runs(Tensor drows, Tensor dpooled, Runs runs, Tensor dx) const {
  if (dx.numel() == 0) return;
  by_type(dx, [&]<class T>(T) {
    by_pack<T>({drows ? drows : dx, dpooled, dx}, [&]<int n>(std::integral_constant<int, n>) {
      const int64_t count = dx.numel() / n;
      fold<T, n><<<blocks_for(count), threads, 0, stream()>>>(
          packs<T, n>(drows), packs<T, n>(dpooled), runs, Rows<T>(dx), dx[1], dx[2],
          runs.within(dx[2]), static_cast<int>(dx[3] / n), count);
    });
  });
  check_launch("fold_runs");
}

template <>
void Kernels<Device::cuda>::add_rows(Tensor x, Tensor sum) const {
  if (x.numel() == 0) return;
  const int64_t rows = x[0], columns = x[1];
  const int64_t stretches = std::min<int64_t>(1024, most_partials / columns);
  const bool two_rounds = rows > 1024 && stretches > 1;
  const int64_t stretch = two_rounds ? std::max<int64_t>(256, ceil_div(rows, stretches)) : rows;
  void* partials = nullptr;
  check(cudaGetSymbolAddress(&partials, partial_rows), "partial sums of rows");
  by_type(x, [&]<class T>(T) {
    by_pack<T>({x}, [&]<int n>(std::integral_constant<int, n>) {
      const dim3 grid(static_cast<unsigned>(ceil_div(columns, column_packs * n)),
                      static_cast<unsigned>(ceil_div(rows, stretch)));
      sum_columns<T, n><<<grid, dim3(column_packs, row_lanes), 0, stream()>>>(
          packs<T, n>(x), rows, static_cast<int>(columns / n), stretch,
          two_rounds ? static_cast<float*>(partials) : pointer<float>(sum), !two_rounds);
    });
  });
  check_launch("add_rows");
  if (!two_rounds) return;
  const Shape shape{ceil_div(rows, stretch), columns};
  add_rows(Tensor::of(partials, shape, DType::f32, Device::cuda), sum);
}

}  // namespace entrain
