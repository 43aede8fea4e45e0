// DashAttention's router for a sequence's last few queries, as while decoding: where dash_bf16.cu
// gives a block of threads all chunks of a tile of queries, eight blocks, a cluster, share them.
//
//   q [rows, D] bf16, shared --ldmatrix--.
//   kbar [M, D] -> float -> three bf16 parts, registers --mma--> q . kbar [rows, chunks], shared
//   a row's --to one block--> all of the row -> scores -> entries near the top -> tau --to all
//   blocks--> w, its logarithms, their sums --to all blocks--> mask, bias
//
// Grid: 8 x (queries x kv heads x batch); rows are up to 64, the heads of a few queries. Chunks go
// to blocks in turns of 32, half a word of the mask. A warp takes the summaries of 8 chunks at a
// time, and those of later ones are on their way to registers while it is at these: 64 KB to a
// block. Blocks send each other what they need, to barriers that count bytes: they never meet again
// once all have begun, and each may leave when it has got everything.
//
// It begins beside the kernel before it: summaries of earlier steps come, and alpha and gamma from
// the host, before that kernel's results are there. The host is far, and seems to answer one
// question after the other: one block of a cluster asks, and nobody waits for it until the products
// are there, which it makes scores of. (When all blocks asked, and waited before the products, a
// layer took 15 us at batch 1, and from 1.5 to 2 us more for each further sequence: 26 at 8, 43
// at 16.)
//
// The time is that of reading the summaries once, f32 in the cache of a bf16 model. Hkv 2, D 128,
// 1536 chunks: 0.8 MB a kv head, at batch 8 13 MB, 5 us at 2.8 TB/s. After that, by estimate:
// queries and products, 1.5 us; thresholds, 2 of 16 rows a block, three passes over 1536 entries
// and about eight over those near the top, 2 us; weights and outputs, 1 us; three times a third of
// a microsecond to send. 16 us in all were expected at batch 8, 10 at batch 1, where reading takes
// 1; an H100 takes 19 and 14.
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/launch_after.cuh"

namespace entrain::cuda {
namespace {

constexpr int threads = 256;
constexpr int cluster = 8;
constexpr int piece = 32;  // chunks; the x-th are those of block x % cluster
constexpr int most_rows = 64;
constexpr int64_t most_queries = 8;

/// What a block knows of its rows.
struct alignas(16) Small {
  // Barriers: what all blocks send this one.
  uint64_t alpha_gamma_sent, scores_sent, thresholds_sent, sums_sent;
  double alpha_gamma[2];         // from the first block,
  double asked[2];               // which has the host's
  float2 thresholds[most_rows];  // top and what tau is above it, from all blocks
  int end[most_rows];            // of a row's candidates; 0 for rows that only fill the tile
};

/// Shared memory: q, Small, z [rows, z_step] products of the block's chunks, whole [own_rows,
/// width] those of all blocks, sums [queries, cluster, pieces] of all blocks.
template <class K>
struct RouteDecode {
  int64_t Hq, Hkv, N, M, first;
  int g, heads;       // heads: kv heads of the batch
  int queries, rows;  // of a tile; rows are a multiple of 16
  int begin, end;     // candidates of the last query
  bool early;         // all summaries of them are older than the kernel before, and
  bool beside;        // so are the queries
  int scored;         // pieces of a block that may have candidates
  int pieces;         // of a block, in all
  DashRouting routing;
  const double* alpha_gamma;  // as the GPU reads them
  Rows<bf16> q;
  Rows<K> kbar;

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

/// A tile of queries of one kv head, 16 row_tiles rows at most, as one block of the cluster sees
/// it.
template <int D, class K, int row_tiles>
class DecodeTile {
 public:
  __device__ DecodeTile(const RouteDecode<K>& p, char* shared)
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

  /// Products of the queries and the block's chunks; those of a row go to the block whose threshold
  /// it is to find too.
  __device__ void multiply() {
    const bool asks = rank_ == 0 && threadIdx.x == 0;
    if (asks) {
      for (int i = 0; i < 2; ++i) {
        copy_async<8>(shared_address(small_.asked + i), p_.alpha_gamma + i, true);
      }
    }
    if (threadIdx.x == 0) {
      expect(alpha_gamma_sent(), sizeof small_.alpha_gamma);
      expect(scores_sent(), p_.own_rows() * p_.width() * static_cast<int>(sizeof(float)));
      expect(thresholds_sent(), p_.rows * static_cast<int>(sizeof(float2)));
      expect(sums_sent(), count_ * cluster * p_.pieces * static_cast<int>(sizeof(float2)));
      barrier_init_done();
    }
    cluster_arrive();
    // Before all else, after alpha and gamma: what takes longest.
    if (!p_.early) wait_for_previous();
    Summaries next[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) load_summaries(next[i], warp() + i * warps);
    if (!p_.beside) wait_for_previous();
    load_queries();
    if (warp() > 0) wait_copies();  // the first warp's is of alpha and gamma
    __syncthreads();
    cluster_meet();
    for (int eight = warp(); eight < eights(); eight += ahead * warps) {
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (eight + i * warps < eights()) multiply(next[i], eight + i * warps);
      }
    }
    __syncthreads();
    wait_for_previous();  // what follows writes where earlier kernels may still read
    let_next_begin();
    if (asks) {
      wait_copies();
      const auto alpha_gamma = *reinterpret_cast<const float4*>(small_.asked);
      for (int to = 0; to < cluster; ++to) {
        send(reinterpret_cast<float4*>(small_.alpha_gamma), alpha_gamma, alpha_gamma_sent(), to);
      }
    }
    __syncwarp();  // else the warp's others ask for what it is to send
  }

  /// alpha, once it is here. From now on products can be made scores as entmax_float.cuh takes
  /// them.
  __device__ double alpha() {
    barrier_wait(alpha_gamma_sent(), 0);
    const auto [alpha, gamma] = small_.alpha_gamma;
    const auto scale = static_cast<float>(gamma * (1 / sqrt(static_cast<double>(D))));
    factor_ = alpha == 1 ? scale : scale * static_cast<float>(alpha - 1);
    return alpha;
  }

  /// Of the rows that are this block's, every eighth; they go to all blocks.
  template <class Entmax>
  __device__ void find_thresholds(const Entmax& entmax, double* tau) {
    if (warp() >= p_.own_rows()) return;
    barrier_wait(scores_sent(), 0);
    float* scores = whole_ + warp() * p_.width();
    const int row = warp() * cluster + rank_, end = small_.end[row];
    const int n = end > p_.begin ? end : 0;
    const float top = scale_row<32>(scores, p_.begin, n, factor_);
    const float least = entmax.alpha_1 > 0 ? -1 : -INFINITY;  // of what the support may hold
    const int kept = keep_above<32>(scores, n, top, least);
    const float t = entmax.template threshold<32>(scores, kept, -1);
    if (lane() < cluster) {
      send(small_.thresholds + row, make_float2(top, t), thresholds_sent(), lane());
    }
    const int i = row / p_.g;
    if (lane() > 0 || i >= count_) return;
    tau[(b_ * p_.Hq + r_ * p_.g + row % p_.g) * p_.N + first_ + i] = n > 0 ? top + t : 0;
  }

  /// log(w + eps) of the support takes the place of the first head's products, NaN elsewhere.
  template <class Entmax>
  __device__ void weigh(const Entmax& entmax, float* weights) {
    const auto eps = static_cast<float>(p_.routing.prior_eps);
    barrier_wait(thresholds_sent(), 0);
    for_pieces([&](int i, int x, int c) {
      const int at = x * piece + lane(), row = i * p_.g;
      const bool candidate = c >= p_.begin && c < small_.end[row];
      float w = 0;
      if (candidate) {
#pragma unroll 4
        for (int h = row; h < row + p_.g; ++h) {
          const auto [top, tau] = small_.thresholds[h];
          // Rounded as in scale_row().
          w += entmax.probability(__fmul_rn(factor_, z(h)[at]) - top, tau);
        }
      }
      w = __fdividef(w, static_cast<float>(p_.g));  // fast for 0 too, what w mostly is
      const bool routed = w > least_weight;
      const float l = routed ? __logf(w + eps) : 0;
      if (x < p_.scored) z(row)[at] = routed ? l : NAN;
      if (weights && c < p_.M) weights[at_query(i) * p_.M + c] = w;
      const float sum = warp_sum(l);
      const int support = __popc(__ballot_sync(0xffffffffu, routed));
      if (lane() < cluster) {
        send(sums_ + (i * cluster + rank_) * p_.pieces + x,
             make_float2(sum, static_cast<float>(support)), sums_sent(), lane());
      }
    });
  }

  /// Mask and bias. Nothing is on its way to this block afterwards, which may leave.
  __device__ void put(const RouteOutput& out) const {
    barrier_wait(scores_sent(), 0);
    barrier_wait(sums_sent(), 0);
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
  static constexpr int warps = threads / 32;
  static constexpr int chains = row_tiles == 1 ? 3 : 1;  // of products, each waiting for the last
  using Summaries = Pack<K, 2>[D / 16][2];          // of 8 chunks: the right operands of products
  static constexpr int ahead = 16 / sizeof(K) / 2;  // so many of them are on their way

  __device__ static int warp() {
    return static_cast<int>(threadIdx.x) / 32;
  }
  __device__ static int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  __device__ uint32_t alpha_gamma_sent() const {
    return shared_address(&small_.alpha_gamma_sent);
  }
  __device__ uint32_t scores_sent() const {
    return shared_address(&small_.scores_sent);
  }
  __device__ uint32_t thresholds_sent() const {
    return shared_address(&small_.thresholds_sent);
  }
  __device__ uint32_t sums_sent() const {
    return shared_address(&small_.sums_sent);
  }
  /// Makes a barrier of what is to come.
  __device__ static void expect(uint32_t barrier, int bytes) {
    barrier_init(barrier, 1);
    barrier_arrive_expecting(barrier, bytes);
  }
  /// Of this block's chunks, those with candidates.
  __device__ int eights() const {
    return piece / 8 * p_.scored;
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

  /// All warps but the first start copying, zeros to rows that only fill the tile.
  __device__ void load_queries() {
    int x = static_cast<int>(threadIdx.x) - 32;
    if (x < 0) x = p_.rows * (D / 8);
#pragma unroll 1
    for (; x < p_.rows * (D / 8); x += threads - 32) {
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
  /// Products with eight chunks, whose summaries make room for later ones.
  __device__ void multiply(Summaries& next, int eight) {
    float sums[row_tiles][chains][4] = {};
    const int later = eight + ahead * warps;
    const bool more = later < eights();
    const K* from = summaries(later);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t parts[3][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        split_in_three(static_cast<float>(next[step][i].at[0]),
                       static_cast<float>(next[step][i].at[1]), parts[2][i], parts[1][i],
                       parts[0][i]);
      }
      if (more) load_step(next, from, step);
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
        if (16 * m >= p_.rows) break;
        Fragment a;
        q_.left(a, 16 * m, step);
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          mma(sums[m][part % chains], a, parts[part][0], parts[part][1]);
        }
      }
    }
    const int at = 8 * eight + lane() % 4 * 2, c = chunk_at(at);
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i) {
      if (8 * i >= p_.rows) break;
      float2 pair = {};
#pragma unroll
      for (const float(&sum)[4] : sums[i / 2]) {
        pair.x += sum[i % 2 * 2];
        pair.y += sum[i % 2 * 2 + 1];
      }
      *reinterpret_cast<float2*>(z(8 * i + lane() / 4) + at) = pair;
      send(reinterpret_cast<float2*>(whole_ + i * p_.width() + c), pair, scores_sent(), lane() / 4);
    }
  }

  /// Where the lane's part of eight chunks begins. After the last candidate it is that one's, as
  /// what comes of it does not matter.
  __device__ const K* summaries(int eight) const {
    const int c = min(chunk_at(8 * eight + lane() / 4), p_.end - 1);
    return p_.kbar.at(b_, r_, c) + lane() % 4 * 2;
  }
  __device__ static void load_step(Summaries& to, const K* from, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[step][i] = *reinterpret_cast<const Pack<K, 2>*>(from + 16 * step + 8 * i);
    }
  }
  __device__ void load_summaries(Summaries& to, int eight) const {
    if (eight >= eights()) return;
    const K* from = summaries(eight);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) load_step(to, from, step);
  }

  /// Calls f(query, piece of this block, the lane's chunk) for all, a warp each.
  template <class F>
  __device__ void for_pieces(F f) const {
    for (int i = 0, x = warp();; x += warps) {
      for (; x >= p_.pieces; x -= p_.pieces) ++i;
      if (i >= count_) return;
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
    return p_.routing.center && support > 0 ? __fdividef(sum, support) : 0;
  }

  const RouteDecode<K>& p_;
  const int rank_;
  const SharedTile<D> q_;
  Small& small_;
  float *const z_, *const whole_;
  float2* const sums_;
  int b_, r_, first_;  // batch, kv head, first query
  int count_;          // queries
  float factor_;       // of products: scores
};

template <int D, class K, int row_tiles>
__global__ void __launch_bounds__(threads, 2)
    route_kernel(const __grid_constant__ RouteDecode<K> p, const RouteOutput out) {
#ifdef ENTRAIN_HOPPER
  DecodeTile<D, K, row_tiles> tile(p, dynamic_shared());
  tile.multiply();
  by_curve(tile.alpha(), [&](const auto& entmax) {
    tile.find_thresholds(entmax, out.tau);
    tile.weigh(entmax, out.weights);
  });
  tile.put(out);
  if (out.read) tile.count_reads(out.read);
#endif
}

/// Whether this GPU's shared memory sufficed.
template <class K>
bool route(const RouteShape& s, const Tensor& q, const Tensor& kbar, const DashRouting& routing,
           int64_t first, bool beside, const RouteOutput& out) {
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  const int queries = whole(std::min<int64_t>(s.N, most_rows / s.g));
  const int begin = whole(routing.init_blocks), end = s.width > 0 ? begin + s.width : 0;
  const bool early = end <= first / routing.chunk;
  const RouteDecode<K> p{s.Hq,
                         s.Hkv,
                         s.N,
                         s.M,
                         first,
                         s.g,
                         whole(s.B * s.Hkv),
                         queries,
                         whole(ceil_div(queries * s.g, 16) * 16),
                         begin,
                         end,
                         early,
                         early && beside,
                         whole(ceil_div(end, cluster * piece)),
                         whole(ceil_div(std::max(s.M, piece * out.half_words), cluster * piece)),
                         routing,
                         in_place(routing.alpha_gamma, 2),
                         Rows<bf16>(q),
                         Rows<K>(kbar)};
  const int64_t bytes = p.bytes(s.D);
  if (bytes > SharedMemory::of_device().most) return false;
  const LaunchAfter launch(dim3(static_cast<unsigned>(cluster * p.tiles() * p.heads)), threads,
                           static_cast<size_t>(bytes), {cluster, 1, 1});
  const auto run = [&]<int row_tiles>(std::integral_constant<int, row_tiles>) {
    s.D == 64 ? launch("route_decode", route_kernel<64, K, row_tiles>, p, out)
              : launch("route_decode", route_kernel<128, K, row_tiles>, p, out);
  };
  p.rows == 16 ? run(std::integral_constant<int, 1>{})
               : run(std::integral_constant<int, most_rows / 16>{});
  return true;
}

}  // namespace

bool route_decode(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                  const Tensor& tau, const BlockSet& blocks, const Tensor& weights,
                  const Tensor& read, bool beside) {
  const RouteShape s = route_shape_of(q, kbar, routing, blocks.first);
  bool wide = false;
  by_pack<bf16>({q}, [&](auto elements) { wide = elements > 1; });
  if (q.dtype != DType::bf16 || routing.aggregation != Aggregation::entmax || !wide ||
      s.N > most_queries || s.g > most_rows || (s.D != 64 && s.D != 128) || !on_hopper()) {
    return false;
  }
  const RouteOutput out(tau, blocks, weights, read);
  bool routed = false;
  by_summary_type(
      kbar, [&]<class K>(K) { routed = route<K>(s, q, kbar, routing, blocks.first, beside, out); });
  return routed;
}

}  // namespace entrain::cuda
