// The choice of blocks of InfLLM-V2 (arXiv 2509.24663) and NSA (arXiv 2502.11089), as on the CPU
// (see kernels/cpu/selection.cpp): softmax over windows of keys, summed over the group's heads,
// scores blocks; forced blocks and the best-scored are attended. In double; what training takes on
// Hopper is in selection_hopper.cu.
//
// A block of threads chooses for a tile of queries of one kv head, up to 64 (query, head) rows. Its
// scores stay in shared memory, whole where they fit; otherwise panel by panel, computed once for
// the softmax's sums and again for the weights. What goes to global memory is the mask.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/entmax_row.cuh"
#include "kernels/cuda/route_hopper.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/selection.cuh"

namespace entrain {
namespace cuda {
namespace {

constexpr int threads = tile_threads, warps = threads / 32;

/// How queries are cut into tiles, and where the parts of a tile lie in shared memory.
struct SelectShape {
  int64_t B, Hq, Hkv, N;
  int g, D, windows, blocks;   // windows and blocks up to the last query
  int queries, rows, panel;    // of a tile
  int lanes;                   // that share a row
  int q_step, z_step, w_step;  // from row to row
  int z, w, top, total;        // where they begin, in doubles; q at 0
  int seen;                    // likewise, in ints
  int64_t bytes;

  void cut(int queries_of_tile, int panel_of_tile) {
    queries = queries_of_tile;
    panel = panel_of_tile;
    rows = queries * g;
    q_step = row_step(D);
    z_step = row_step(panel);
    w_step = windows;
    z = (rows + 15) / 16 * 16 * q_step;
    w = z + std::max(rows * z_step, queries * blocks);  // scores of blocks take the place of z
    top = w + queries * w_step;
    total = top + rows;
    seen = 2 * (total + rows);
    bytes = 4 * int64_t{seen + queries};
  }
  __host__ __device__ int64_t tiles() const { return (N + queries - 1) / queries; }
};

/// Grid: tiles, those with most windows first, times kv heads and batch.
template <class T, class K>
__global__ void __launch_bounds__(threads, 2)
    select(const SelectShape s, const BlockSelection selection, int64_t first_token, Rows<T> q,
           Rows<K> keys, uint32_t* mask, int64_t half_words, double* read) {
  extern __shared__ __align__(16) double shared[];
  double *z = shared + s.z, *w = shared + s.w, *top = shared + s.top, *total = shared + s.total;
  int* seen = reinterpret_cast<int*>(shared) + s.seen;
  const int warp = threadIdx.x / 32, rank = threadIdx.x % s.lanes;
  const int group = threadIdx.x / s.lanes, groups = threads / s.lanes;
  const Lanes lanes(s.lanes);
  const int64_t heads = s.B * s.Hkv, head = blockIdx.x % heads, b = head / s.Hkv, r = head % s.Hkv;
  const int64_t first = (s.tiles() - 1 - blockIdx.x / heads) * s.queries;
  const auto count = static_cast<int>(s.N - first < s.queries ? s.N - first : s.queries);
  const int64_t token = first_token + first;
  const Sight sight{selection.length, selection.stride};
  const int rows = count * s.g;
  const auto width = static_cast<int>(sight.end(token + count - 1));
  for (int i = threadIdx.x; i < count; i += threads) {
    seen[i] = static_cast<int>(sight.end(token + i));
  }
  for (int row = threadIdx.x; row < rows; row += threads) {
    top[row] = -INFINITY;
    total[row] = 0;
  }
  load_queries(q.at(b, r * s.g, first), q.head_step, q.token_step, count, s.g, s.D,
               1 / sqrt(static_cast<double>(s.D)), shared);

  auto score_panel = [&](int from) {
    const int n = width - from < s.panel ? width - from : s.panel;
    __syncthreads();
    score(shared, rows, s.D, keys.at(b, r, from), keys.token_step, n, z, s.z_step);
    __syncthreads();
    return n;
  };
  for (int from = 0; from < width; from += s.panel) {
    const int n = score_panel(from);
    for (int row = group; row - group < rows; row += groups) {  // whole warps together
      const int left = row < rows ? seen[row / s.g] - from : 0;
      const int m = left < n ? left : n;
      double* e = z + (row < rows ? row : 0) * s.z_step;
      double most = -INFINITY, sum = 0;
      for (int c = rank; c < m; c += s.lanes) most = fmax(most, e[c]);
      const double old = row < rows ? top[row] : 0;
      most = fmax(old, lanes.max(most));
      for (int c = rank; c < m; c += s.lanes) sum += e[c] = exp(e[c] - most);
      sum = lanes.sum(sum);
      __syncwarp();  // all lanes of the row have read its top
      if (row >= rows || rank != 0) continue;
      top[row] = most;
      total[row] = total[row] * (old == most ? 1 : exp(old - most)) + sum;
    }
  }
  const bool whole = width <= s.panel;  // z holds exp(score - top) of all windows
  for (int from = 0; from < width; from += s.panel) {
    int n = width;
    if (whole) {
      __syncthreads();
    } else {
      n = score_panel(from);
    }
    for (int x = threadIdx.x; x < count * n; x += threads) {
      const int i = x / n, c = x % n;
      if (from + c >= seen[i]) continue;
      double sum = 0;
      for (int row = i * s.g; row < (i + 1) * s.g; ++row) {
        const double e = z[row * s.z_step + c];
        sum += (whole ? e : exp(e - top[row])) * (1 / total[row]);
      }
      w[i * s.w_step + from + c] = sum;
    }
  }
  __syncthreads();

  double* scores = z;
  const auto blocks = static_cast<int>((token + count - 1) / selection.block + 1);
  for (int x = threadIdx.x; x < count * blocks; x += threads) {
    const int i = x / blocks, c = x % blocks;
    scores[i * s.blocks + c] = BlockWindows(selection, c).add(0.0, w + i * s.w_step, 0, seen[i]);
  }
  __syncthreads();
  for (int i = warp; i < count; i += warps) {
    choose(selection, scores + i * s.blocks, static_cast<int>((token + i) / selection.block),
           mask + ((b * s.Hkv + r) * s.N + first + i) * half_words, half_words);
  }

  if (!read || threadIdx.x != 0) return;
  int64_t entries = 0;  // whole numbers: the order of adding them does not show
  for (int i = 0; i < count; ++i) entries += seen[i];
  double* fields = read + r * read_fields;
  atomicAdd(fields + read_router, static_cast<double>(entries));
  atomicAdd(fields + read_flops, static_cast<double>(2 * entries * s.g * s.D));  // no way back
}

/// Grid (parts, Hkv): a thread takes queries of one kv head and the batch.
__global__ void __launch_bounds__(threads)
    read_pairs_of_window(const uint64_t* mask, int64_t B, int64_t H, int64_t N, int64_t words,
                         int64_t block, int64_t first, int64_t window, double* read) {
  __shared__ int64_t shared[32];
  const int64_t r = blockIdx.y, step = int64_t{gridDim.x} * threads;
  int64_t pairs = 0;
  for (int64_t x = int64_t{blockIdx.x} * threads + threadIdx.x; x < B * N; x += step) {
    const int64_t i = x % N, end = first + i + 1;
    const uint64_t* bits = mask + ((x / N * H + r) * N + i) * words;
    for (int64_t begin = end > window ? end - window : 0; begin < end;) {
      const int64_t c = begin / block, next = (c + 1) * block < end ? (c + 1) * block : end;
      if (!(bits[c / 64] >> (c % 64) & 1)) pairs += next - begin;
      begin = next;
    }
  }
  pairs = block_sum(pairs, shared);
  if (threadIdx.x == 0) {  // whole numbers: the order of adding them does not show
    atomicAdd(read + r * read_fields + read_pairs, static_cast<double>(pairs));
  }
}

void check_shapes(const Tensor& q, const Tensor& keys, const BlockSelection& selection,
                  const BlockSet& blocks) {
  const bool fit = q.shape.rank == 4 && keys.shape.rank == 4 && q[0] == keys[0] &&
                   q[3] == keys[3] && keys[1] > 0 && q[1] % keys[1] == 0 &&
                   keys[2] == selection.windows(blocks.first + q[2]) &&
                   blocks.mask[3] * 64 * selection.block >= blocks.first + q[2];
  if (!fit) {
    fail("selection for queries " + q.shape.to_string() + " over windows " +
         keys.shape.to_string() + " into a mask " + blocks.mask.shape.to_string());
  }
  check_pairs("keys of windows", keys);
}

/// Tiles of up to 64 rows: as many as leave room for two blocks in a multiprocessor, where that is
/// 16 or more, else for one; windows in panels where they do not fit.
SelectShape select_shape(const Tensor& q, const Tensor& keys, const BlockSelection& selection,
                         const BlockSet& blocks) {
  SelectShape s;
  s.B = q[0], s.Hq = q[1], s.Hkv = keys[1], s.N = q[2];
  s.g = static_cast<int>(s.Hq / s.Hkv);
  s.D = static_cast<int>(q[3]);
  s.windows = static_cast<int>(keys[2]);
  s.blocks = static_cast<int>(ceil_div(blocks.first + s.N, selection.block));
  const auto [most, half] = SharedMemory::of_device();
  s.cut(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(s.N, 64 / s.g))), s.windows);
  while (s.queries > 1 && s.bytes > half && s.rows >= 32) s.cut(s.queries / 2, s.panel);
  while (s.panel > 128 && s.bytes > most) s.cut(s.queries, s.panel / 2);
  while (s.queries > 1 && s.bytes > most) s.cut(s.queries / 2, s.panel);
  if (s.bytes > most) {
    fail("selection among " + std::to_string(s.windows) + " windows with " + std::to_string(s.g) +
         " query heads to a kv head needs " + std::to_string(s.bytes) + " bytes of shared " +
         "memory, more than the " + std::to_string(most) + " of this GPU; take a larger stride");
  }
  s.lanes = 32;
  while (s.lanes > 4 && s.lanes * s.rows > threads) s.lanes /= 2;
  return s;
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <>
void Kernels<Device::cuda>::select_blocks(Tensor q, Tensor keys, const BlockSelection& selection,
                                          const BlockSet& blocks, Tensor scratch,
                                          Tensor read) const {
  if (q.numel() == 0) return;
  check_shapes(q, keys, selection, blocks);
  if (select_hopper(q, keys, selection, blocks, scratch, read)) return;
  const SelectShape s = select_shape(q, keys, selection, blocks);
  const dim3 grid(static_cast<unsigned>(s.tiles() * s.B * s.Hkv));
  auto* mask = reinterpret_cast<uint32_t*>(pointer<uint64_t>(blocks.mask));
  by_type(q, [&]<class T>(T) {
    auto launch = [&]<class K>(K) {
      launch_tiles("select_blocks", select<T, K>, grid, s.bytes, s, selection, blocks.first,
                   Rows<T>(q), Rows<K>(keys), mask, 2 * blocks.mask[3], pointer<double>(read));
    };
    keys.dtype == DType::f64 ? launch(double{}) : launch(T{});
  });
}

template <>
int64_t Kernels<Device::cuda>::select_scratch(const Shape& keys) {
  return Summaries::scratch(keys);
}

template <>
void Kernels<Device::cuda>::read_window(const BlockSet& blocks, int64_t window, Tensor read) const {
  const Tensor& mask = blocks.mask;
  const int64_t B = mask[0], H = mask[1], N = mask[2], words = mask[3];
  if (mask.numel() == 0) return;
  const auto parts = static_cast<unsigned>(std::min<int64_t>(ceil_div(B * N, threads), 64));
  launch_tiles("read_window", read_pairs_of_window, dim3(parts, static_cast<unsigned>(H)), 0,
               pointer<uint64_t>(mask), B, H, N, words, blocks.block, blocks.first, window,
               pointer<double>(read));
}

}  // namespace entrain
