// DashAttention's chunk summaries (arXiv 2605.18753, stage 0) of bf16 keys, and their way back.
//
//   k [chunk, D] bf16 --16 bytes a lane--> registers -> s . k_t -> scores, shared
//   softmax of the scores, in each warp -> a_t -> sum_t a_t k_t, registers
//   of a warp's rows --shuffles--> of all warps --shared, f64--> kbar
//
// A block of 2 D threads takes a chunk of up to 64 tokens. D / 8 lanes share a token, 16 tokens are
// rows of the block at a time, four times in all: a thread holds what it loads, so keys are read
// once and are all on their way at the start. kbar is f64 or f32, but bf16 keys have 8 digits of
// their own: sums over a lane's eight dimensions or four tokens are float, those over lanes of a
// score and over warps double. That leaves errors of 1e-7, and a float's 24 digits are all that
// routers of bf16 queries take from kbar.
//
// The time is that of memory. B 4, Hkv 4, D 64, N 16384: 34 MB of keys, 12 us at 2.8 TB/s, and on
// the way back 100 MB of k and dk, 36 us. One token a warp and two bytes a lane took 72 and 835 us;
// an H100 takes 18 and 36.
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/dash_summaries.cuh"
#include "kernels/cuda/entmax_row.cuh"
#include "kernels/cuda/launch_after.cuh"

namespace entrain::cuda {
namespace {

constexpr int most_tokens = 64;
constexpr int rows = 16;  // tokens of a block at a time
constexpr int held = most_tokens / rows;

/// Where a thread of a block is among tokens and dimensions: eight of them from `d` on, of tokens
/// row, row + 16...
template <int D>
struct Place {
  static constexpr int lanes = D / 8, threads = rows * lanes, warps = threads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / lanes;
  const int d = static_cast<int>(threadIdx.x) % lanes * 8;
};

using Eight = float[8];

__device__ __forceinline__ void widen(const uint4& from, Eight& to) {
  const uint32_t pairs[] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(pairs[i] << 16);
    to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 narrow(const Eight& x) {
  return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

/// The thread's parts of a chunk's rows of keys; zeros after the last.
template <int D>
__device__ __forceinline__ void load(uint4 (&to)[held], const Place<D>& at, const bf16* from,
                                     int64_t step, int chunk) {
#pragma unroll
  for (int x = 0; x < held; ++x) {
    const int t = at.row + rows * x;
    to[x] = make_uint4(0, 0, 0, 0);
    if (t < chunk) to[x] = *reinterpret_cast<const uint4*>(from + t * step + at.d);
  }
}

/// Leaves v . k_t for the block's rows in out.
template <int D>
__device__ __forceinline__ void put_dots(const uint4 (&keys)[held], const Eight& v,
                                         const Place<D>& at, double* out) {
#pragma unroll
  for (int x = 0; x < held; ++x) {
    Eight k;
    widen(keys[x], k);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(v[i], k[i], sum);
    const double dot = Lanes(Place<D>::lanes).sum(static_cast<double>(sum));
    if (at.d == 0) out[at.row + rows * x] = dot;
  }
}

/// Numbers of a chunk's tokens as every warp has them: lane l those of tokens l and l + 32.
struct OfTokens {
  float at[2];

  /// Those of the thread's rows.
  template <int D>
  __device__ __forceinline__ void to_rows(float (&to)[held], const Place<D>& place) const {
#pragma unroll
    for (int x = 0; x < held; ++x) {
      const int t = rows * x;  // 16 x + row is token (16 x + row) % 32 of the first or second half
      to[x] = __shfl_sync(0xffffffffu, at[t / 32], t % 32 + place.row);
    }
  }
};

/// a = softmax_t(scores / sqrt(D)) over a chunk, 0 after it; without scores all the same.
template <int D>
__device__ __forceinline__ OfTokens softmax(const double* scores, int chunk, int lane) {
  OfTokens a;
  if (!scores) {
    for (int i = 0; i < 2; ++i) {
      a.at[i] = lane + 32 * i < chunk ? 1 / static_cast<float>(chunk) : 0;
    }
    return a;
  }
  const Lanes all(32);
  double x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) x[i] = lane + 32 * i < chunk ? scores[lane + 32 * i] : -INFINITY;
  const double top = all.max(fmax(x[0], x[1]));  // passes over NaN; the exponentials do not
  const float scale = 1 / sqrtf(D);
#pragma unroll
  for (int i = 0; i < 2; ++i) a.at[i] = expf(static_cast<float>(x[i] - top) * scale);
  const float sum = all.sum(a.at[0] + a.at[1]);
#pragma unroll
  for (float& w : a.at) w /= sum;
  return a;
}

/// out(d, sum): sums over the block's rows of the threads' eight x. shared: [warps, D]; a barrier
/// must lie between its last use and this.
template <int D, class T, class F>
__device__ __forceinline__ void sum_rows(T (&x)[8], const Place<D>& at, T* shared, F out) {
  using P = Place<D>;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int o = P::lanes; o < 32; o *= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], o);
    if (at.lane < P::lanes) shared[at.warp * D + at.d + i] = x[i];
  }
  __syncthreads();
  for (int d = static_cast<int>(threadIdx.x); d < D; d += P::threads) {
    double sum = 0;
#pragma unroll
    for (int warp = 0; warp < P::warps; ++warp) sum += shared[warp * D + d];
    out(d, sum);
  }
}

/// Grid: chunks x kv heads x batch.
template <int D, class K>
__global__ void __launch_bounds__(Place<D>::threads, 1024 / Place<D>::threads)
    summarize(Rows<bf16> k, const float* s, int chunk, Rows<K> kbar, int H, int N, int M) {
  __shared__ double scores[most_tokens];
  __shared__ float sums[Place<D>::warps * D];
  const Place<D> at;
  const int c = static_cast<int>(blockIdx.x) % M, head = static_cast<int>(blockIdx.x) / M;
  const int r = head % H, b = head / H;
  K* to = kbar.at(b, r, c);
  wait_for_previous();
  let_next_begin();
  if ((c + 1) * chunk > N) {  // a trailing partial chunk has no summary
    for (int d = static_cast<int>(threadIdx.x); d < D; d += Place<D>::threads) to[d] = 0;
    return;
  }
  uint4 keys[held];
  load(keys, at, k.at(b, r, c * chunk), k.token_step, chunk);
  if (s) {
    Eight query;
#pragma unroll
    for (int i = 0; i < 8; ++i) query[i] = s[r * D + at.d + i];
    put_dots(keys, query, at, scores);
    __syncthreads();
  }
  float a[held], sum[8] = {};
  softmax<D>(s ? scores : nullptr, chunk, at.lane).to_rows(a, at);
#pragma unroll
  for (int x = 0; x < held; ++x) {
    Eight key;
    widen(keys[x], key);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = fmaf(a[x], key[i], sum[i]);
  }
  sum_rows(sum, at, sums, [&](int d, double total) { to[d] = static_cast<K>(total); });
}

/// Grid (parts, Hkv): a block takes every parts-th chunk of one kv head and the batch. With
/// e_t = dkbar . k_t: dk_t += a_t dkbar + a_t (e_t - mean) s / sqrt(D), ds += sum_t a_t (e_t -
/// mean) k_t / sqrt(D), mean = sum_u a_u e_u. ds stays in registers until all chunks are done.
template <int D>
__global__ void __launch_bounds__(Place<D>::threads, 512 / Place<D>::threads)
    summarize_backward(Rows<bf16> k, const float* s, int chunk, const double* dkbar, Rows<bf16> dk,
                       int B, int H, int N, int M) {
  // Chunks use them in turns, so that one barrier a chunk does.
  __shared__ double scores[2][most_tokens], products[2][most_tokens];
  __shared__ double sums[Place<D>::warps * D];
  const Place<D> at;
  const int r = static_cast<int>(blockIdx.y), complete = N / chunk;
  const float scale = 1 / sqrtf(D);
  Eight query = {};
  for (int i = 0; s && i < 8; ++i) query[i] = s[r * D + at.d + i];
  double ds[8] = {};
  int turn = 0;
  for (int n = static_cast<int>(blockIdx.x); n < B * complete; n += static_cast<int>(gridDim.x)) {
    const int b = n / complete, c = n % complete;
    bf16* dkeys = dk.at(b, r, c * chunk);
    uint4 keys[held], grads[held];
    load(keys, at, k.at(b, r, c * chunk), k.token_step, chunk);
    load(grads, at, dkeys, dk.token_step, chunk);
    Eight dout;
    const auto* from =
        reinterpret_cast<const double2*>(dkbar + (int64_t{b * H + r} * M + c) * D + at.d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dout[2 * i] = static_cast<float>(from[i].x);
      dout[2 * i + 1] = static_cast<float>(from[i].y);
    }
    if (s) put_dots(keys, query, at, scores[turn]);
    put_dots(keys, dout, at, products[turn]);
    __syncthreads();

    const OfTokens weights = softmax<D>(s ? scores[turn] : nullptr, chunk, at.lane);
    double e[2], mean = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      e[i] = products[turn][at.lane + 32 * i];
      mean += weights.at[i] * e[i];
    }
    mean = warp_sum(mean);
    OfTokens dscores;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dscores.at[i] = s ? weights.at[i] * static_cast<float>(e[i] - mean) * scale : 0;
    }
    float a[held], dscore[held], part[8] = {};
    weights.to_rows(a, at);
    dscores.to_rows(dscore, at);
#pragma unroll
    for (int x = 0; x < held; ++x) {
      Eight key, sum;
      widen(keys[x], key);
      widen(grads[x], sum);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[i] += fmaf(a[x], dout[i], dscore[x] * query[i]);
        part[i] = fmaf(dscore[x], key[i], part[i]);
      }
      const int t = at.row + rows * x;
      if (t < chunk) *reinterpret_cast<uint4*>(dkeys + t * dk.token_step + at.d) = narrow(sum);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) ds[i] += part[i];
    turn = 1 - turn;
  }
  if (!s) return;
  sum_rows(ds, at, sums,
           [&](int d, double total) { ds_parts[(blockIdx.x * H + r) * D + d] = total; });
}

/// Whether chunks and rows of these tensors are such as kernels here take.
bool take(const Tensor& k, int64_t chunk, const Tensor& like_k) {
  if (k.dtype != DType::bf16 || chunk > most_tokens || (k[3] != 64 && k[3] != 128)) return false;
  bool wide = false;
  by_pack<bf16>({k, like_k}, [&](auto elements) { wide = elements > 1; });
  return wide;
}

/// Calls f with head_dim.
template <class F>
void by_dim(int64_t D, F f) {
  D == 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
}

}  // namespace

bool summarize_bf16(const Tensor& k, const Tensor& s, int64_t chunk, const Tensor& kbar) {
  if (!take(k, chunk, k)) return false;
  const auto H = static_cast<int>(k[1]), N = static_cast<int>(k[2]), M = static_cast<int>(kbar[2]);
  by_dim(k[3], [&]<int D>(std::integral_constant<int, D>) {
    by_summary_type(kbar, [&]<class K>(K) {
      const LaunchAfter launch(dim3(static_cast<unsigned>(k[0] * H * M)), Place<D>::threads, 0);
      launch("summarize", summarize<D, K>, Rows<bf16>(k), pointer<float>(s),
             static_cast<int>(chunk), Rows<K>(kbar), H, N, M);
    });
  });
  return true;
}

bool summarize_backward_bf16(const Tensor& k, const Tensor& s, int64_t chunk, const Tensor& dkbar,
                             const Tensor& dk_sum, const Tensor& ds_sum) {
  if (!take(k, chunk, dk_sum)) return false;
  const int64_t B = k[0], H = k[1], N = k[2], D = k[3];
  const int64_t blocks = 132 * 512 / (2 * D);  // 512 threads for each multiprocessor of an H100
  const int64_t parts = ds_parts_of(B * (N / chunk), blocks, H, D);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(H));
  by_dim(D, [&]<int D>(std::integral_constant<int, D>) {
    summarize_backward<D><<<grid, Place<D>::threads, 0, stream()>>>(
        Rows<bf16>(k), pointer<float>(s), static_cast<int>(chunk), pointer<double>(dkbar),
        Rows<bf16>(dk_sum), static_cast<int>(B), static_cast<int>(H), static_cast<int>(N),
        static_cast<int>(dkbar[2]));
  });
  check_launch("summarize_backward");
  if (s) add_ds_parts(parts, H * D, pointer<float>(ds_sum));
  return true;
}

}  // namespace entrain::cuda
