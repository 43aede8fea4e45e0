// DashAttention's router for a sequence's last few queries, as while decoding: where dash_bf16.cu
// gives a block of threads all chunks of a tile of queries, eight blocks, a cluster, share them.
//
//   q [rows, D] bf16, shared --ldmatrix--.
//   kbar [M, D] f64 -> float -> three bf16 parts, registers --mma--> z [rows, own chunks], shared
//   a row's z --to one block--> all of the row -> entries near its top -> tau --to all blocks-->
//   w, its logarithms, their sums --to all blocks--> mask, bias
//
// Grid: 8 x (queries x kv heads x batch); rows are up to 64, the heads of a few queries. Chunks go
// to blocks in turns of 32, half a word of the mask. A warp takes the summaries of 8 chunks at a
// time, and those of the next 8 are on their way to registers while it is at these: 64 KB to a
// block. Where D is 128 that takes all registers, and a few words needed later are spilled. Blocks
// write into each other's memory and read their own alone, so that three meetings of the cluster do
// and the last one lets them go.
//
// The time is that of reading the summaries once. Hkv 2, D 128, 1536 chunks: 1.6 MB a kv head, at
// batch 8 25 MB, 9 us at 2.8 TB/s; to start, 3 us; thresholds, 2 of 16 rows a block, two passes
// over 1536 entries and about eight over those near the top, 3 us; meetings, each with a fence of
// half a microsecond, weights and outputs, 5 us. With Newton's steps over whole rows, scores
// fetched by those who need them and five meetings it took 27.5 us. Batch 1: 16 blocks, three
// rounds of summaries, 3 us in place of 9.
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/hopper.cuh"

namespace entrain::cuda {
namespace {

constexpr int threads = 256;
constexpr int cluster = 8;
constexpr int piece = 32;  // chunks; the x-th are those of block x % cluster
constexpr int most_rows = 64;
constexpr int64_t most_queries = 8;

/// What a block knows of its rows.
struct Small {
  double alpha;
  float factor;                  // of q . kbar: scores as entmax_float.cuh takes them
  float2 thresholds[most_rows];  // top and what tau is above it, from all blocks
  int end[most_rows];            // of a row's candidates; 0 for rows that only fill the tile
};

/// Shared memory: q, Small, z [rows, z_step], whole [own_rows, width] scores of all blocks, sums
/// [queries, cluster, pieces] of all blocks.
struct RouteDecode {
  int64_t Hq, Hkv, N, M, first;
  int g, heads;       // heads: kv heads of the batch
  int queries, rows;  // of a tile; rows are a multiple of 16
  int begin, end;     // candidates of the last query
  int scored;         // pieces of a block that may have candidates
  int pieces;         // of a block, in all
  DashRouting routing;
  const double* alpha_gamma;  // as the GPU reads them
  Rows<bf16> q;
  Rows<double> kbar;

  __host__ __device__ int z_step() const { return piece * scored + 8; }  // rows: different banks
  __host__ __device__ int own_rows() const { return rows / cluster; }
  __host__ __device__ int width() const { return cluster * piece * scored; }
  int64_t tiles() const { return ceil_div(N, queries); }
  int64_t bytes(int64_t D) const {
    const int64_t floats = int64_t{rows} * z_step() + int64_t{own_rows()} * width();
    return 2 * rows * D + static_cast<int64_t>(sizeof(Small)) + 4 * floats +
           8 * queries * cluster * pieces;
  }
};

/// Shifts a row by its top and drops entries of `least` after that or less: each lane moves the
/// others of its own together. Returns how far the lane's row then goes.
template <int width>
__device__ int keep_above(float* row, int n, float top, float least) {
  float* const own = row + 4 * Lanes(width).rank;
  int kept = 0;
  const auto keep = [&](float x) {
    own[kept / 4 * 4 * width + kept % 4] = x;
    ++kept;
  };
  for_fours<width>(row, n, [&](const float4& at, int) {
    const float4 four = at;
    for (const float x : {four.x, four.y, four.z, four.w}) {
      if (!(x - top <= least)) keep(x - top);  // NaN stays
    }
  });
  while (n > 0 && (kept == 0 || kept % 4 > 0)) keep(-INFINITY);
  return kept * width;
}

/// A tile of queries of one kv head, as one block of the cluster sees it.
template <int D>
class DecodeTile {
 public:
  __device__ DecodeTile(const RouteDecode& p, char* shared)
      : p_(p),
        rank_(static_cast<int>(blockIdx.x) % cluster),
        q_{shared_address(shared)},
        small_(*reinterpret_cast<Small*>(shared + SharedTile<D>::bytes(p.rows))),
        z_(reinterpret_cast<float*>(&small_ + 1)),
        whole_(z_ + p.rows * p.z_step()),
        sums_(reinterpret_cast<float2*>(whole_ + p.own_rows() * p.width())) {
    const int tile = static_cast<int>(blockIdx.x) / cluster, head = tile % p.heads;
    b_ = head / static_cast<int>(p.Hkv);
    r_ = head % static_cast<int>(p.Hkv);
    first_ = tile / p.heads * p.queries;
    count_ = min(p.queries, static_cast<int>(p.N) - first_);
  }

  __device__ double alpha() const { return small_.alpha; }

  /// Scores of the block's chunks; those of a row go to the block whose threshold it is to find
  /// too.
  __device__ void score() {
    cluster_begin();
    double alpha = 0, gamma = 0;
    if (threadIdx.x == 0) {
      alpha = p_.alpha_gamma[0];
      gamma = p_.alpha_gamma[1];
    }
    Summaries next;
    load_summaries(next, warp());  // before all else, with alpha and gamma: what takes longest
    load_queries();
    if (threadIdx.x == 0) {
      const auto scale = static_cast<float>(gamma * (1 / sqrt(static_cast<double>(D))));
      small_.alpha = alpha;
      small_.factor = alpha == 1 ? scale : scale * static_cast<float>(alpha - 1);
    }
    float* const owner = in_block(whole_, lane() / 4);
    wait_copies();
    __syncthreads();
    cluster_has_begun();
    const float factor = small_.factor;
    for (int eight = warp(); eight < piece / 8 * p_.scored; eight += warps) {
      float sum[row_tiles][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t parts[3][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          split_in_three(static_cast<float>(next[step][i].x), static_cast<float>(next[step][i].y),
                         parts[2][i], parts[1][i], parts[0][i]);
        }
        load_summaries(next, eight + warps, step);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          if (16 * m >= p_.rows) break;
          Fragment a;
          q_.left(a, 16 * m, step);
#pragma unroll
          for (int part = 0; part < 3; ++part) mma(sum[m], a, parts[part][0], parts[part][1]);
        }
      }
      const int at = 8 * eight + lane() % 4 * 2, c = chunk_at(at);
#pragma unroll
      for (int i = 0; i < 2 * row_tiles; ++i) {
        if (8 * i >= p_.rows) break;
        const int row = 8 * i + lane() / 4, end = small_.end[row];
        const float* pair = sum[i / 2] + i % 2 * 2;
        const float2 scores =
            make_float2(c >= p_.begin && c < end ? factor * pair[0] : -INFINITY,
                        c + 1 >= p_.begin && c + 1 < end ? factor * pair[1] : -INFINITY);
        *reinterpret_cast<float2*>(z(row) + at) = scores;
        *reinterpret_cast<float2*>(owner + i * p_.width() + c) = scores;
      }
    }
  }

  /// Of the rows that are this block's, every eighth; they go to all blocks.
  template <class Entmax>
  __device__ void find_thresholds(const Entmax& entmax, double* tau) {
    if (warp() >= p_.own_rows()) return;
    float* scores = whole_ + warp() * p_.width();
    const int row = warp() * cluster + rank_, end = small_.end[row];
    const int n = end > p_.begin ? end : 0;
    const float top = row_top<32>(scores, n);
    const float least = entmax.alpha_1 > 0 ? -1 : -INFINITY;  // of what the support may hold
    const int kept = keep_above<32>(scores, n, top, least);
    const float t = entmax.template threshold<32>(scores, kept, -1);
    if (lane() < cluster) *in_block(small_.thresholds + row, lane()) = make_float2(top, t);
    const int i = row / p_.g;
    if (lane() > 0 || i >= count_) return;
    tau[(b_ * p_.Hq + r_ * p_.g + row % p_.g) * p_.N + first_ + i] = n > 0 ? top + t : 0;
  }

  /// log(w + eps) of the support takes the place of the first head's scores, NaN elsewhere.
  template <class Entmax>
  __device__ void weigh(const Entmax& entmax, float* weights) {
    const auto eps = static_cast<float>(p_.routing.prior_eps);
    for_pieces([&](int i, int x, int c) {
      const int at = x * piece + lane(), row = i * p_.g;
      const bool candidate = c >= p_.begin && c < small_.end[row];
      float w = 0;
      if (candidate) {
#pragma unroll 4
        for (int h = row; h < row + p_.g; ++h) {
          const auto [top, tau] = small_.thresholds[h];
          w += entmax.probability(z(h)[at] - top, tau);
        }
      }
      w /= static_cast<float>(p_.g);
      const bool routed = w > least_weight;
      const float l = routed ? __logf(w + eps) : 0;
      if (x < p_.scored) z(row)[at] = routed ? l : NAN;
      if (weights && c < p_.M) weights[at_query(i) * p_.M + c] = w;
      const float sum = warp_sum(l);
      const int support = __popc(__ballot_sync(0xffffffffu, routed));
      if (lane() < cluster) {
        *in_block(sums_ + (i * cluster + rank_) * p_.pieces + x, lane()) =
            make_float2(sum, static_cast<float>(support));
      }
    });
  }

  /// Mask and bias, once all blocks have weighed.
  __device__ void put(const RouteOutput& out) const {
    const auto init = static_cast<int>(p_.routing.init_blocks);
    const auto local = static_cast<int>(p_.routing.local_blocks);
    const auto share = static_cast<float>(1 / p_.routing.sigma);
    for_pieces([&](int i, int x, int c) {
      const float l = x < p_.scored ? z(i * p_.g)[x * piece + lane()] : NAN;
      const bool routed = l == l;
      const int own = own_chunk(i);
      const bool forced = c <= own && (c < init || c > own - local);
      const unsigned bits = __ballot_sync(0xffffffffu, routed || forced);
      if (lane() == 0 && c / piece < out.half_words) {
        out.mask[at_query(i) * out.half_words + c / piece] = bits;
      }
      const float mu = mean_log(i);
      if (c < p_.M) out.bias[at_query(i) * p_.M + c] = routed ? (l - mu) * share : 0;
    });
  }

  __device__ void count_reads(double* read) const {
    if (rank_ != 0 || threadIdx.x != 0) return;
    int64_t entries = 0;  // whole numbers: the order of adding them does not show
    for (int i = 0; i < count_; ++i) entries += max(small_.end[i * p_.g] - p_.begin, 0);
    double* fields = read + r_ * read_fields;
    atomicAdd(fields + read_router, static_cast<double>(entries));
    atomicAdd(fields + read_flops, static_cast<double>(6 * entries * p_.g * D));
  }

 private:
  static constexpr int warps = threads / 32, row_tiles = most_rows / 16;
  using Summaries = double2[D / 16][2];  // of 8 chunks, pairs as the right operands of products

  __device__ static int warp() {
    return static_cast<int>(threadIdx.x) / 32;
  }
  __device__ static int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  __device__ float* z(int row) const {
    return z_ + row * p_.z_step();
  }
  /// The chunk that is this block's x-th.
  __device__ int chunk_at(int x) const {
    return (x / piece * cluster + rank_) * piece + x % piece;
  }
  __device__ int own_chunk(int i) const {
    return static_cast<int>(static_cast<uint32_t>(p_.first + first_ + i) /
                            static_cast<uint32_t>(p_.routing.chunk));  // in 32 bits much the faster
  }
  __device__ int64_t at_query(int i) const {
    return (b_ * p_.Hkv + r_) * p_.N + first_ + i;
  }

  /// Starts copying, zeros to rows that only fill the tile.
  __device__ void load_queries() {
    for (int x = static_cast<int>(threadIdx.x); x < p_.rows * (D / 8); x += threads) {
      const int row = x / (D / 8), c = x % (D / 8), i = row / p_.g;
      copy_async<16>(q_.chunk(row, c), p_.q.at(b_, r_ * p_.g + row % p_.g, first_ + i) + 8 * c,
                     i < count_);
    }
    const auto row = static_cast<int>(threadIdx.x);
    if (row < p_.rows) {
      const int i = row / p_.g;
      const auto n = static_cast<int>(candidates(p_.routing, own_chunk(i)));
      small_.end[row] = i < count_ && n > 0 ? p_.begin + n : 0;
    }
  }
  /// The step's dimensions of the eight chunks; zeros after the last candidate.
  __device__ void load_summaries(Summaries& to, int eight, int step) const {
    const int c = chunk_at(8 * eight + lane() / 4);
    const bool is = eight < piece / 8 * p_.scored && c < p_.end;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[step][i] = make_double2(0, 0);
      if (is) {
        to[step][i] = *reinterpret_cast<const double2*>(p_.kbar.at(b_, r_, c) + 16 * step + 8 * i +
                                                        lane() % 4 * 2);
      }
    }
  }
  __device__ void load_summaries(Summaries& to, int eight) const {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) load_summaries(to, eight, step);
  }

  /// Calls f(query, piece of this block, the lane's chunk) for all, a warp each.
  template <class F>
  __device__ void for_pieces(F f) const {
    for (int y = warp(); y < count_ * p_.pieces; y += warps) {
      const int i = y / p_.pieces, x = y % p_.pieces;
      f(i, x, chunk_at(x * piece + lane()));
    }
  }

  /// The mean of a query's logarithms, from all blocks' sums in order, where it is to be taken off.
  __device__ float mean_log(int i) const {
    float sum = 0, support = 0;
    for (int x = lane(); x < cluster * p_.pieces; x += 32) {
      const float2 part = sums_[i * cluster * p_.pieces + x];
      sum += part.x;
      support += part.y;
    }
    sum = warp_sum(sum);
    support = warp_sum(support);
    return p_.routing.center && support > 0 ? sum / support : 0;
  }

  const RouteDecode& p_;
  const int rank_;
  const SharedTile<D> q_;
  Small& small_;
  float *const z_, *const whole_;
  float2* const sums_;
  int b_, r_, first_;  // batch, kv head, first query
  int count_;          // queries
};

template <int D>
__global__ void __launch_bounds__(threads, 2)
    route_kernel(const __grid_constant__ RouteDecode p, const RouteOutput out) {
#ifdef ENTRAIN_HOPPER
  DecodeTile<D> tile(p, dynamic_shared());
  tile.score();
  cluster_meet();
  by_curve(tile.alpha(), [&](const auto& entmax) {
    tile.find_thresholds(entmax, out.tau);
    cluster_meet();
    tile.weigh(entmax, out.weights);
  });
  cluster_meet();  // from here on blocks are on their own, and may leave
  tile.put(out);
  if (out.read) tile.count_reads(out.read);
#endif
}

}  // namespace

bool route_decode(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                  const Tensor& tau, const BlockSet& blocks, const Tensor& weights,
                  const Tensor& read) {
  const RouteShape s = route_shape_of(q, kbar, routing, blocks.first);
  bool wide = false;
  by_pack<bf16>({q}, [&](auto elements) { wide = elements > 1; });
  if (q.dtype != DType::bf16 || routing.aggregation != Aggregation::entmax || !wide ||
      s.N > most_queries || s.g > most_rows || (s.D != 64 && s.D != 128) || !on_hopper()) {
    return false;
  }
  const RouteOutput out(tau, blocks, weights, read);
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  const int queries = whole(std::min<int64_t>(s.N, most_rows / s.g));
  const int begin = whole(routing.init_blocks), end = s.width > 0 ? begin + s.width : 0;
  const RouteDecode p{s.Hq,
                      s.Hkv,
                      s.N,
                      s.M,
                      blocks.first,
                      s.g,
                      whole(s.B * s.Hkv),
                      queries,
                      whole(ceil_div(queries * s.g, 16) * 16),
                      begin,
                      end,
                      whole(ceil_div(end, cluster * piece)),
                      whole(ceil_div(std::max(s.M, piece * out.half_words), cluster * piece)),
                      routing,
                      in_place(routing.alpha_gamma, 2),
                      Rows<bf16>(q),
                      Rows<double>(kbar)};
  const int64_t bytes = p.bytes(s.D);
  if (bytes > SharedMemory::of_device().most) return false;
  const dim3 grid(static_cast<unsigned>(cluster * p.tiles() * p.heads));
  const auto run = [&](auto kernel) {
    launch_clusters("route_decode", kernel, cluster, grid, threads, static_cast<size_t>(bytes), p,
                    out);
  };
  s.D == 64 ? run(route_kernel<64>) : run(route_kernel<128>);
  return true;
}

}  // namespace entrain::cuda
