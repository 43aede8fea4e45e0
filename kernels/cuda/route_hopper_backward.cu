// The way back through DashAttention's router on Hopper, second part: dq and the rows' centres.
//
// Gradients are 0 off the support, so that a row tile, 64 / g neighbouring queries of a kv head
// with their g heads, needs scores of the union of its queries' supports alone. A thread block, one
// warpgroup, takes a row tile and gathers the union's summaries, 64 at a time, a pack:
//
//   sweep 1: z -> s, registers; of rows, the sums of s and s dw -> centre = sum s dw / sum s
//   sweep 2: s of the last pack, where it is, of others anew -> dz, bf16 -> dq += dz kbar,
//   registers
//
// Mostly one pack is all: each score is then computed once. Several thread blocks in a
// multiprocessor overlap what each waits for.
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64 at density 0.125: 8192 row tiles, a
// pack each, of which neighbours that look alike fill about 24 rows of 64; products of whole packs,
// 6 D operations for each of 4096 pairs, 2.6e10, 26 us at 989 TFLOP/s; summaries from L2, 24 rows
// of 768 bytes, q and dq, 48 KB: 0.55 GB, 0.1 ms; about 1000 instructions a warp, 40 us beside
// both. Expected: 0.12 ms. Three sweeps over all candidates, the first for the rows' largest entry,
// the second for the weights, took 0.64 ms.
#include <cmath>

#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda {
namespace {

constexpr int threads = warpgroup;
constexpr int no_chunk = 0x7fffffff;  // fills packs up

/// Shared memory: the rows of q; of a pack, the three parts of summaries, dw, chunks; a barrier.
template <int D>
struct Layout {
  static constexpr int blocks_of_multiprocessor = D == 64 ? 4 : 3;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int parts_at = block_bytes;
  static constexpr int list_at = 4 * block_bytes;
  static constexpr int barrier_at = list_at + 64 * 4;
  static constexpr int table_at = barrier_at + 16;

  static int shared_bytes(int queries) { return 1024 + table_at + queries * RowTile::step * 4; }
};

/// Whole tiles whose chunks of the union, 64 at most, are gathered.
struct Pack {
  int begin, end;
};

/// A warpgroup and its row tile.
template <int D>
class QueryRows {
 public:
  using Shape = Layout<D>;

  __device__ QueryRows(const HopperRouteBackward& p, int head, int row_tile, char* memory)
      : p_(p),
        shared_(uniform(static_cast<int>(shared_address(memory)))),
        list_(reinterpret_cast<int*>(memory + Shape::list_at)),
        dw_(memory + Shape::table_at),
        head_(head),
        row_tile_(row_tile),
        first_(row_tile * p.route.queries),
        count_(min(p.route.queries, p.route.N - first_)),
        item_{head / p.route.Hkv, head % p.route.Hkv, first_, p.route.first_tile(),
              p.route.end_tile(first_ + count_ - 1)},
        rows_(p.route) {
    rows_.place(p.route, first_, count_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_[i] = rows_.routes(i) ? rows_.lane_row(i) / p.route.g : 0;
      const double* tau = p.tau + p.route.at_row(item_, first_ + row_[i], head_of_row(i));
      threshold_[i] = rows_.routes(i) ? static_cast<float>(*tau) : 0;
    }
  }

  template <class Entmax>
  __device__ __forceinline__ void take(const CUtensorMap& q, const Entmax& entmax,
                                       const Rows<bf16>& dq) {
    const uint32_t barrier = shared_ + Shape::barrier_at;
    if (threadIdx.x == 0) copy_rows<D>(Block{shared_}, q, barrier, p_.route, item_, first_);
    float total[2] = {0, 0}, weighted[2] = {0, 0}, sum[D / 8][4] = {};
    pin(sum);
    int from = item_.begin, last = -1;  // where the next pack begins; sweep 2: and the last one
#pragma unroll 1
    do {
      const Pack pack = find(from);
      copy(pack.end == item_.end || last >= 0);
      barrier_wait(barrier, 0);
      float s[8][4];
      weigh(s, entmax);
      from = pack.end;
      if (last < 0) {
        sum_up(s, total, weighted);
        if (pack.end < item_.end) continue;
        find_centres(total, weighted);
        last = pack.begin;
        from = item_.begin;
      }
      add_gradients(sum, s);
    } while (from != last);
    add_to(dq, sum);
  }

 private:
  /// Of the thread's row i, within the group.
  __device__ __forceinline__ int head_of_row(int i) const {
    return rows_.lane_row(i) % p_.route.g;
  }

  /// Lists the next chunks of the union, in tiles from `from` on.
  __device__ Pack find(int from) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int bit = static_cast<int>(threadIdx.x) % 64, half = static_cast<int>(threadIdx.x) / 64;
    const uint64_t* words = p_.union_of(head_, row_tile_);
    __syncthreads();  // the last pack is done with
    int found = 0, at = from, taken = 32;
    while (taken == 32 && at < item_.end) {
      const uint64_t word = at + lane < item_.end ? words[at + lane] : 0;
      int up_to = __popcll(word);  // and the lanes before
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int before = __shfl_up_sync(~0u, up_to, o);
        if (lane >= o) up_to += before;
      }
      taken = __popc(__ballot_sync(~0u, found + up_to <= 64));
      for (int i = half; i < min(taken, item_.end - at); i += 2) {
        const uint64_t bits = __shfl_sync(~0u, word, i);
        const int before = found + __shfl_sync(~0u, up_to, i) - __popcll(bits);
        if (bits >> bit & 1) {
          list_[before + __popcll(bits & ((uint64_t{1} << bit) - 1))] = 64 * (at + i) + bit;
        }
      }
      if (taken > 0) found += __shfl_sync(~0u, up_to, taken - 1);
      at = min(at + taken, item_.end);
    }
    if (half == 0 && bit >= found) list_[bit] = no_chunk;
    __syncthreads();
    return {from, at};
  }

  /// Starts copies of the listed chunks' dw and summaries, of the rounded ones where wanted; zeros
  /// after the last.
  __device__ void copy(bool rounded) const {
    const auto thread = static_cast<int>(threadIdx.x);
    const bf16* from = p_.summaries_of(head_);
    const int64_t step = p_.summaries_step();
#pragma unroll 2
    for (int x = thread; x < 64 * D / 8; x += threads) {
      const int row = x / (D / 8), piece = x % (D / 8), c = list_[row];
      const bool is = c != no_chunk;
      const bf16* source = from + (is ? int64_t{c} * D : 0) + 8 * piece;
      const uint32_t to = shared_ + Shape::parts_at + piece / 8 * panel_bytes + row * 128 +
                          (piece % 8 ^ row % 8) * 16;
      copy_async<16>(to, source, is);
      copy_async<16>(to + Shape::block_bytes, source + step, is);
      if (rounded) copy_async<16>(to + 2 * Shape::block_bytes, source + 2 * step, is);
    }
    const int column = thread % 64, c = list_[column];
    const float* dw = p_.dbias_of(item_, first_) + (c != no_chunk ? c : 0);
#pragma unroll 4
    for (int i = thread / 64; i < p_.route.queries; i += threads / 64) {
      copy_async<4>(shared_address(dw_.at(i, column)),
                    dw + (i < count_ ? int64_t{i} * p_.route.M : 0), c != no_chunk && i < count_);
    }
  }

  /// s = p^(2 - alpha) of what was copied.
  template <class Entmax>
  __device__ __forceinline__ void weigh(float (&s)[8][4], const Entmax& entmax) {
    rows_.load(Block{shared_});  // anew: sums have their registers meanwhile
    wait_copies();
    show_to_engines();
    __syncthreads();
    rows_.multiply(s, shared_ + Shape::parts_at);
    rows_.scale(s);
    const int2* chunks = reinterpret_cast<const int2*>(list_) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int2 c = chunks[4 * j];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool is = (e % 2 == 0 ? c.x : c.y) < rows_.end[e / 2];
        s[j][e] = is ? entmax.weight(s[j][e], threshold_[e / 2]) : 0;
      }
    }
  }
  __device__ __forceinline__ void sum_up(const float (&s)[8][4], float (&total)[2],
                                         float (&weighted)[2]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 dw = dw_.pair(row_[i], j);
        total[i] += s[j][2 * i] + s[j][2 * i + 1];
        weighted[i] += s[j][2 * i] * dw.x + s[j][2 * i + 1] * dw.y;
      }
    }
  }
  /// sum += dz kbar of the pack that s is of.
  __device__ __forceinline__ void add_gradients(float (&sum)[D / 8][4], float (&s)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 dw = dw_.pair(row_[i], j);
        s[j][2 * i] *= dw.x - centre_[i];
        s[j][2 * i + 1] *= dw.y - centre_[i];
      }
    }
    Fragment dz[4];
    round_to(dz, s);
    products_fence();
    add_product(sum, dz, Block{shared_ + Shape::parts_at + 2 * Shape::block_bytes});
    products_commit();
    products_wait<0>();
    pin(sum);
  }

  /// The third part wants them, too.
  __device__ __forceinline__ void find_centres(const float (&total)[2],
                                               const float (&weighted)[2]) {
    RowNumbers* to = p_.rows_of(item_, row_tile_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float all = Lanes(4).sum(total[i]), of_dw = Lanes(4).sum(weighted[i]);
      centre_[i] = all > 0 ? of_dw / all : 0;
      if (threadIdx.x % 4 == 0) {
        to[rows_.lane_row(i)] = {threshold_[i], centre_[i], rows_.end[i]};
      }
    }
  }
  /// dq += scale sum: the thread has a pair of every eight columns of its rows.
  __device__ __forceinline__ void add_to(const Rows<bf16>& dq, const float (&sum)[D / 8][4]) const {
    const auto scale = static_cast<float>(p_.route.alpha_gamma[1] / sqrt(static_cast<double>(D)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows_.routes(i)) continue;
      bf16* row = dq.at(item_.b, item_.r * p_.route.g + head_of_row(i), first_ + row_[i]);
      uint32_t* to = reinterpret_cast<uint32_t*>(row) + threadIdx.x % 4;
      uint32_t old[D / 8];
#pragma unroll
      for (int j = 0; j < D / 8; ++j) old[j] = to[4 * j];
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        to[4 * j] = pack(__uint_as_float(old[j] << 16) + scale * sum[j][2 * i],
                         __uint_as_float(old[j] & 0xffff0000u) + scale * sum[j][2 * i + 1]);
      }
    }
  }

  const HopperRouteBackward& p_;
  const uint32_t shared_;
  int* const list_;                            // the pack's chunks, ascending, then no_chunk
  const RowTile dw_;                           // by query and place in the list
  const int head_, row_tile_, first_, count_;  // kv head and batch; queries
  const RouteItem item_;
  RouteRows<D> rows_;
  int row_[2];  // queries of the thread's rows, from first_ on; 0 where they do not route
  float threshold_[2], centre_[2];
};

/// Grid: row tiles, those with most candidates first, times kv heads and batch.
template <int D>
__global__ void __launch_bounds__(threads, Layout<D>::blocks_of_multiprocessor)
    query_gradients(const __grid_constant__ CUtensorMap q,
                    const __grid_constant__ HopperRouteBackward p, const Rows<bf16> dq) {
#ifdef ENTRAIN_HOPPER
  const uint32_t at = shared_address(dynamic_shared());
  char* const memory = dynamic_shared() + ((at + 1023) / 1024 * 1024 - at);
  if (threadIdx.x == 0) {
    barrier_init(shared_address(memory) + Layout<D>::barrier_at, 1);
    barrier_init_done();
  }
  __syncthreads();
  const auto index = static_cast<int>(blockIdx.x);
  QueryRows<D> rows(p, index % p.heads, p.row_tiles - 1 - index / p.heads, memory);
  by_curve(p.route.alpha_gamma[0], [&](const auto& entmax) { rows.take(q, entmax, dq); });
#endif
}

/// Sizes, and how sums over rows are cut: into about three times as many as an H100 has
/// multiprocessors, on any GPU, so that sums do not depend on it.
HopperRouteBackward backward_sizes(const Shape& q, const Shape& kbar) {
  const int64_t heads = kbar[0] * kbar[1], queries = block_rows / (q[1] / kbar[1]);
  const int64_t tiles = ceil_div(kbar[2], 64), row_tiles = ceil_div(q[2], queries);
  // Half of all pairs of a row tile and 128 chunks have candidates, and those on the diagonal.
  const int64_t wanted = ceil_div(6 * 132, heads * (ceil_div(tiles, 2) + 1));
  const int64_t segment = ceil_div(row_tiles, wanted);
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  return {whole(heads), whole(tiles), whole(row_tiles), whole(segment),
          whole(ceil_div(row_tiles, segment))};
}

/// Where the parts of scratch begin, in bytes, the summaries at 0.
struct BackwardScratch {
  int64_t rows, unions, sums, bytes;

  BackwardScratch(const HopperRouteBackward& p, const Shape& kbar) {
    rows = Summaries::scratch(kbar) * int64_t{sizeof(double)};
    const int64_t row_tiles = int64_t{p.heads} * p.row_tiles;
    unions = rows + row_tiles * block_rows * int64_t{sizeof(RowNumbers)};
    sums = unions + 8 * row_tiles * p.tiles;
    bytes = sums + 4 * int64_t{p.heads} * p.segments * 64 * p.tiles * kbar[3];
  }
};

}  // namespace

int64_t hopper_route_backward_scratch(const Shape& q, const Shape& kbar) {
  const int64_t D = q[3], g = kbar[1] > 0 ? q[1] / kbar[1] : 0;
  const bool fits = (D == 64 || D == 128) && g >= 1 && g <= block_rows && kbar.numel() > 0;
  if (!fits || !on_hopper()) return 0;
  return BackwardScratch(backward_sizes(q, kbar), kbar).bytes / int64_t{sizeof(double)};
}

bool route_backward_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                           const Tensor& tau, const BlockSet& blocks, const Tensor& dbias,
                           const Tensor& dq_sum, const Tensor& dkbar, const Tensor& scratch) {
  if (!hopper_route_takes(q, kbar, routing)) return false;
  const Summaries summaries = prepare_summaries(kbar, scratch);
  HopperRouteBackward p = backward_sizes(q.shape, kbar.shape);
  const BackwardScratch at(p, kbar.shape);
  char* memory = reinterpret_cast<char*>(pointer<double>(scratch));
  p.route = hopper_route_problem(q, kbar, routing, 0);
  p.tau = pointer<double>(tau);
  p.summaries = pointer<bf16>(summaries.high);
  p.mask = pointer<uint64_t>(blocks.mask);
  p.words = static_cast<int>(blocks.mask[3]);
  p.bias = pointer<float>(blocks.bias);
  p.dbias = pointer<float>(dbias);
  p.rows = reinterpret_cast<RowNumbers*>(memory + at.rows);
  p.unions = reinterpret_cast<uint64_t*>(memory + at.unions);
  p.sums = reinterpret_cast<float*>(memory + at.sums);
  const CUtensorMap queries = packed_map(Rows<bf16>(q), p.route.B, p.route.Hq, p.route.N, p.route.D,
                                         p.route.g, block_rows / p.route.g);
  hopper_route_dw(p);
  by_dense_head_dim(p.route.D, [&](auto D) {
    launch("route_backward: dq", query_gradients<D>, int64_t{p.heads} * p.row_tiles, threads,
           Layout<D>::shared_bytes(p.route.queries), queries, p, Rows<bf16>(dq_sum));
  });
  hopper_route_dkbar(p, queries, summaries, pointer<double>(dkbar));
  return true;
}

}  // namespace entrain::cuda
