#pragma once
// How a thread block of route_hopper_gradients.cu takes its row tiles, one after the other: what it
// has in shared memory, and the two sweeps.
#include <cmath>

#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda::route_gradients {

constexpr int threads = warpgroup;

/// Shared memory: the rows of q; of a pack, three parts of summaries, chunks and dw; of this row
/// tile and the next, numbers of rows and unions; barriers of q and dq; which chunks have sums.
/// Once a pack's scores are known, dz takes the place of the high parts and dq's rows that of the
/// low ones; once dz has been used, sums for dkbar take its place and the rounded parts', with
/// what lies before them.
template <int D>
struct Layout {
  static constexpr int blocks_of_multiprocessor = D == 64 ? 4 : 3;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int sum_step = 4 * D + 32;  // bytes; pairs of four rows in different banks
  static constexpr int sums_at = block_bytes, rounded_at = sums_at + 2048;
  static constexpr int parts_at = rounded_at + block_bytes, low_at = parts_at + block_bytes;
  static constexpr int list_at = low_at + block_bytes;
  static constexpr int barriers_at = list_at + 64 * 4;
  static constexpr int taus_at = barriers_at + 16, ends_at = taus_at + 2 * block_rows * 8;
  static constexpr int dw_at = ends_at + 2 * block_rows * 8;
  static_assert(sums_at + block_rows * sum_step == low_at);

  __host__ __device__ static int unions_at(int queries) {
    return dw_at + queries * RowTile::step * 4;
  }
  static int shared_bytes(int queries, int tiles) {
    return 1024 + unions_at(queries) + 3 * 8 * tiles;
  }
};

/// Whole tiles whose chunks of the union, 64 at most, are gathered; how many these are.
struct ChunkPack {
  int begin, end, count;
};

/// A warpgroup on its way through its part of a head's row tiles.
template <int D>
class QueryRows {
 public:
  using Shape = Layout<D>;

  __device__ QueryRows(const HopperRouteBackward& p, const CUtensorMap& q, const CUtensorMap& dq,
                       int head, int part, char* memory)
      : p_(p),
        q_(q),
        dq_(dq),
        memory_(memory),
        shared_(uniform(static_cast<int>(shared_address(memory)))),
        list_(reinterpret_cast<int*>(memory + Shape::list_at)),
        taus_(reinterpret_cast<double*>(memory + Shape::taus_at)),
        ends_(reinterpret_cast<int2*>(memory + Shape::ends_at)),
        dw_(memory + Shape::dw_at),
        unions_(reinterpret_cast<uint64_t*>(memory + Shape::unions_at(p.route.queries))),
        summed_(unions_ + 2 * p.tiles),
        head_(head),
        part_(part),
        scale_(static_cast<float>(p.route.alpha_gamma[1] / sqrt(static_cast<double>(D)))),
        rows_(p.route) {
    item_ = {head / p.route.Hkv, head % p.route.Hkv, 0, p.route.first_tile(), 0};
    if (threadIdx.x == 0) {
      barrier_init(barrier(), 1);
      barrier_init(dq_barrier(), 1);
      barrier_init_done();
    }
    for (int tile = thread(); tile < p.tiles; tile += threads) summed_[tile] = 0;
    // Nobody's rows take part in sums over rows.
    for (int panel = 0; panel < D / 64; ++panel) {
      for (int x = p.route.queries * p.route.g * 128 + 16 * thread(); x < panel_bytes;
           x += 16 * threads) {
        *reinterpret_cast<uint4*>(memory + panel * panel_bytes + x) = uint4{};
      }
    }
    show_to_engines();
    __syncthreads();
  }

  /// Before the first row tile.
  __device__ __forceinline__ void begin(int row_tile) const {
    copy_numbers(row_tile, 0);
    copy_q(row_tile);
    wait_copies();
    __syncthreads();
  }

  /// A row tile; what is known of the next one is on its way meanwhile.
  template <class Entmax>
  __device__ __forceinline__ void take(int row_tile, int next, const Entmax& entmax) {
    place(row_tile);
    int from = item_.begin, last = -1;  // where the next pack begins; sweep 2: and the last one
    ChunkPack pack = find(from);
    copy_numbers(next, phase_ ^ 1);
    if (pack.count == 0) return skip(next);
    float total[2] = {0, 0}, weighted[2] = {0, 0};
    volatile float sum[D / 8][4];  // of dq, from pack to pack; scores have its registers
#pragma unroll 1
    for (;;) {
      copy(pack.end == item_.end || last >= 0);
      barrier_wait(barrier(), phase_);
      float s[8][4];
      weigh(s, entmax);
      from = pack.end;
      if (last < 0) {
        sum_up(s, total, weighted);
        if (from == item_.end) {
          find_centres(total, weighted);
          last = pack.begin;
          from = item_.begin;
        }
      }
      if (last >= 0) {
        const bool ends = from == last;
        add_gradients(s, sum, pack.begin == last, ends, next);
        if (ends) break;
      }
      pack = find(from);
    }
    phase_ ^= 1;
  }

  /// For who adds parts up.
  __device__ void end() const {
    wait_stores();
    __syncthreads();
    uint64_t* to = p_.summed + p_.part_of(head_, part_) * p_.tiles;
    for (int tile = thread(); tile < p_.tiles; tile += threads) to[tile] = summed_[tile];
  }

 private:
  /// Read anew each time: else what follows from it stays in registers from row tile to row tile.
  __device__ static int thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
  }
  __device__ static int lane_row(int i) {
    return RouteRows<D>::lane_row(i, thread());
  }
  __device__ uint32_t barrier() const {
    return shared_ + Shape::barriers_at;
  }
  __device__ uint32_t dq_barrier() const {
    return barrier() + 8;
  }
  /// The union of a row tile's queries; of two row tiles, one after the other.
  __device__ uint64_t* union_of(uint32_t phase) const {
    return unions_ + phase * p_.tiles;
  }

  /// Puts a row tile's numbers, starts copies of its thresholds and union, and has the second-level
  /// cache read its rows.
  __device__ __forceinline__ void copy_numbers(int row_tile, uint32_t phase) const {
    if (row_tile >= p_.row_tiles) return;
    const int first = row_tile * p_.route.queries, row = thread();
    const int count = min(p_.route.queries, p_.route.N - first);
    if (row < block_rows) {
      const int query = row / p_.route.g, head = row % p_.route.g;
      const bool is = query < count;
      copy_async<8>(shared_address(taus_ + phase * block_rows + row),
                    p_.tau + (is ? p_.route.at_row(item_, first + query, head) : 0), is);
      const int end = is ? p_.route.end(first + query) : p_.route.init();
      ends_[phase * block_rows + row] = {end, end > p_.route.init() ? query : 0};
    }
    const int end = p_.route.end_tile(first + count - 1);
    const uint64_t* from = p_.union_of(head_, row_tile);
    for (int tile = item_.begin + thread(); tile < end; tile += threads) {
      copy_async<8>(shared_address(union_of(phase) + tile), from + tile, true);
    }
    if (thread() != 0) return;
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      prefetch_panel(q_, panel * 64, item_.r * p_.route.g, first, item_.b);
      prefetch_panel(dq_, panel * 64, item_.r * p_.route.g, first, item_.b);
    }
  }
  /// Starts the copy of a row tile's queries.
  __device__ __forceinline__ void copy_q(int row_tile) const {
    if (threadIdx.x != 0 || row_tile >= p_.row_tiles) return;
    copy_rows<D>(Block{shared_}, q_, barrier(), p_.route, item_, row_tile * p_.route.queries);
  }
  /// Ends a row tile whose queries route nowhere.
  __device__ __forceinline__ void skip(int next) {
    barrier_wait(barrier(), phase_);
    wait_copies();
    __syncthreads();
    copy_q(next);
    phase_ ^= 1;
  }

  __device__ __forceinline__ void place(int row_tile) {
    const int first = row_tile * p_.route.queries;
    count_ = min(p_.route.queries, p_.route.N - first);
    item_.first = first;
    item_.end = p_.route.end_tile(first + count_ - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto row = phase_ * block_rows + lane_row(i);
      threshold_[i] = static_cast<float>(taus_[row]);
      rows_.end[i] = ends_[row].x;
      row_[i] = ends_[row].y;
    }
  }

  /// Of the n-th chunk of a pack: the four warps have as many.
  __device__ static int place_of(int n) {
    return n % 4 * 16 + n / 4;
  }
  /// Lists the next chunks of the union, in tiles from `from` on.
  __device__ __forceinline__ ChunkPack find(int from) const {
    const int lane = thread() % 32, bit = thread() % 64, half = thread() / 64;
    __syncthreads();  // the last pack is done with
    const uint64_t* const union_words = union_of(phase_);
    int found = 0, at = from, taken = 32;
    while (taken == 32 && at < item_.end) {
      const uint64_t word = at + lane < item_.end ? union_words[at + lane] : 0;
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
          const int n = before + __popcll(bits & ((uint64_t{1} << bit) - 1));
          list_[place_of(n)] = 64 * (at + i) + bit;
        }
      }
      if (taken > 0) found += __shfl_sync(~0u, up_to, taken - 1);
      at = min(at + taken, item_.end);
    }
    if (half == 0 && bit >= found) list_[place_of(bit)] = p_.route.M;  // no such chunk
    wait_stores_read();
    __syncthreads();
    return {from, at, found};
  }

  /// Starts copies of the listed chunks' summaries, of rounded ones where wanted, and of their dw;
  /// of the last two, which products take, zeros where there is none.
  __device__ __forceinline__ void copy(bool rounded) const {
    const int64_t step = p_.heads * p_.elements_of_head();  // from part to part
    const bf16* from = p_.summaries + head_ * p_.elements_of_head();
    constexpr int pieces = D / 8, rows = threads / pieces;  // a row's; at a time, whole swizzles
    const int piece = thread() % pieces, first = thread() / pieces;
    uint32_t to = shared_ + Shape::parts_at + piece / 8 * panel_bytes + first * 128 +
                  (piece % 8 ^ first % 8) * 16;
    from += 8 * piece;
#pragma unroll 2
    for (int row = first; row < 64; row += rows, to += rows * 128) {
      const int c = list_[row];
      const bool is = c < p_.route.M;
      const bf16* source = from + int64_t{c} * D;
      if (is) {
        copy_async<16>(to, source, true);
        copy_async<16>(to + Shape::block_bytes, source + step, true);
      }
      if (rounded) copy_async<16>(to - Shape::block_bytes, source + 2 * step, is);
    }
    const int column = thread() % 64, c = list_[column];
    const float* dw = p_.dbias + p_.route.at_query(item_, item_.first) * p_.route.M + c;
#pragma unroll 4
    for (int i = thread() / 64; i < p_.route.queries; i += threads / 64) {
      copy_async<4>(shared_address(dw_.at(i, column)), dw + int64_t{i} * p_.route.M,
                    c < p_.route.M && i < count_);
    }
  }

  /// s = p^(2 - alpha) of what was copied.
  template <class Entmax>
  __device__ __forceinline__ void weigh(float (&s)[8][4], const Entmax& entmax) {
    rows_.load(Block{shared_}, thread());  // anew: sums have their registers meanwhile
    wait_copies();
    show_to_engines();
    __syncthreads();
    rows_.multiply(s, shared_ + Shape::parts_at);
    rows_.scale(s);
    const int2* chunks = reinterpret_cast<const int2*>(list_) + thread() % 4;
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
  __device__ __forceinline__ void find_centres(const float (&total)[2],
                                               const float (&weighted)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float all = Lanes(4).sum(total[i]), of_dw = Lanes(4).sum(weighted[i]);
      centre_[i] = all > 0 ? of_dw / all : 0;
    }
  }

  /// From s of a pack: sum += dz kbar, and dz^T q to the part's sums. starts, ends: it is the first
  /// or the last of the row tile's; with the last, sum is added to dq, and the next row tile's
  /// queries are asked for.
  __device__ __forceinline__ void add_gradients(float (&s)[8][4],
                                                volatile float (&sum_before)[D / 8][4], bool starts,
                                                bool ends, int next) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 dw = dw_.pair(row_[i], j);
        s[j][2 * i] *= dw.x - centre_[i];
        s[j][2 * i + 1] *= dw.y - centre_[i];
      }
    }
    wait_stores();    // sums of the pack before are where these will be added
    __syncthreads();  // all have their scores
    if (ends && threadIdx.x == 0) {
      copy_rows<D>(Block{shared_ + Shape::low_at}, dq_, dq_barrier(), p_.route, item_, item_.first);
    }
    put_rounded(s, memory_ + Shape::parts_at, thread());
    show_to_engines();
    __syncthreads();
    const Block dz{shared_ + Shape::parts_at}, kbar{shared_ + Shape::rounded_at};
    float sum[D / 8][4] = {};
    if (!starts) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = sum_before[j][e];
      }
    }
    products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      product_with_columns<false>(sum, dz.rows(step), kbar.columns(step), true);
    }
    multiply_columns(s, dz, 0);
    products_wait<0>();
    pin(sum);
    pin(s);
    if (ends) {
      add_to_dq(sum);
    } else {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_before[j][e] = sum[j][e];
      }
    }
    __syncthreads();     // kbar is done with, dq's rows are complete
    float second[8][4];  // panel
    if constexpr (D == 128) {
      products_fence();
      multiply_columns(second, dz, 1);
    }
    if (ends) store_dq();
    if constexpr (D == 128) {
      products_wait<0>();
      pin(second);
      __syncthreads();  // dz is done with
    }
    if (ends) copy_q(next);
    put_sums(s, 0);
    if constexpr (D == 128) put_sums(second, 1);
    send_sums();
  }
  /// Writes an accumulator, rounded, to a block of one panel.
  __device__ __forceinline__ static void put_rounded(const float (&from)[8][4], char* to,
                                                     int thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      char* at = to + row * 128 + (j ^ row % 8) * 16 + thread % 4 * 4;
      *reinterpret_cast<uint32_t*>(at) = pack(from[j][0], from[j][1]);
      *reinterpret_cast<uint32_t*>(at + 8 * 128) = pack(from[j][2], from[j][3]);
    }
  }
  /// Starts dz^T q of a panel of q.
  __device__ __forceinline__ void multiply_columns(float (&sum)[8][4], Block dz, int panel) const {
    const Block q{shared_ + panel * panel_bytes};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      product_with_columns<true>(sum, dz.columns(step), q.columns(step), step > 0);
    }
    products_commit();
  }
  /// A panel of sums for dkbar, whose rows are places in the list.
  __device__ __forceinline__ void put_sums(const float (&sum)[8][4], int panel) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_row(i);
      if (list_[row] == p_.route.M) continue;
      char* at = memory_ + Shape::sums_at + row * Shape::sum_step + panel * 256;
      float2* to = reinterpret_cast<float2*>(at) + thread() % 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) to[4 * j] = make_float2(sum[j][2 * i], sum[j][2 * i + 1]);
    }
  }
  /// Adds them to the part's: a lane sends one of its warp's 16 rows on its way. Where a chunk has
  /// no sums yet, these are its first.
  __device__ __forceinline__ void send_sums() const {
    show_to_engines();
    __syncwarp();
    const int lane = thread() % 32, row = thread() / 32 * 16 + lane;
    const int c = lane < 16 ? list_[row] : p_.route.M;
    if (c < p_.route.M) {
      float* to = p_.sums + p_.part_of(head_, part_) * p_.elements_of_head() + int64_t{c} * D;
      const uint32_t from = shared_ + Shape::sums_at + row * Shape::sum_step;
      const uint64_t bit = uint64_t{1} << c % 64;
      auto* summed = reinterpret_cast<unsigned long long*>(summed_ + c / 64);
      if (atomicOr(summed, bit) & bit) {
        add_bytes(to, from, 4 * D);
      } else {
        store_bytes(to, from, 4 * D);
      }
      commit_stores();
    }
    __syncwarp();
  }

  /// dq += scale sum; the thread has a pair of every eight columns of its rows.
  __device__ __forceinline__ void add_to_dq(const float (&sum)[D / 8][4]) {
    barrier_wait(dq_barrier(), dq_phase_);
    dq_phase_ ^= 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows_.routes(i)) continue;
      const int row = lane_row(i);
      char* from = memory_ + Shape::low_at + row * 128 + thread() % 4 * 4;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        auto* at = reinterpret_cast<uint32_t*>(from + j / 8 * panel_bytes + (j % 8 ^ row % 8) * 16);
        const uint32_t old = *at;
        *at = pack(__uint_as_float(old << 16) + scale_ * sum[j][2 * i],
                   __uint_as_float(old & 0xffff0000u) + scale_ * sum[j][2 * i + 1]);
      }
    }
    show_to_engines();
  }
  __device__ __forceinline__ void store_dq() const {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        store_panel(dq_, shared_ + Shape::low_at + panel * panel_bytes, panel * 64,
                    item_.r * p_.route.g, item_.first, item_.b);
      }
      commit_stores();
    }
    __syncwarp();
  }

  const HopperRouteBackward& p_;
  const CUtensorMap &q_, &dq_;
  char* const memory_;
  const uint32_t shared_;
  int* const list_;         // the pack's chunks, and M where there is none
  double* const taus_;      // by row; of two row tiles
  int2* const ends_;        // likewise: of candidates; the query, 0 where it does not route
  const RowTile dw_;        // by query and place in the list
  uint64_t* const unions_;  // by tile; of two row tiles
  uint64_t* const summed_;  // by tile: the chunks that have sums
  const int head_, part_;   // head: kv head and batch
  const float scale_;
  RouteRows<D> rows_;
  uint32_t phase_ = 0, dq_phase_ = 0;  // of the barriers; the former of what is of two row tiles

  // Of the row tile.
  int count_;  // queries
  RouteItem item_;
  int row_[2];  // queries of the thread's rows, from the first on; 0 where they do not route
  float threshold_[2], centre_[2];
};

}  // namespace entrain::cuda::route_gradients
