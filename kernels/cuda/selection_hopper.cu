// The choice of blocks for bf16 queries on Hopper: selection.cu's mathematics in float, for any
// number of windows, whose scores are never kept.
//
// A row is a (query, head). A thread block takes items: neighbouring queries of one kv head, up to
// 64 / g for each of its three warpgroups. Tiles of 64 windows go through a ring of stages, which
// all three share, in two sweeps:
//
//   q [64 rows, D], registers, and keys [64 windows, D], shared --wgmma--> z [64 rows, 64 windows]
//   sweep 1: z -> each lane's largest score and sum of exponentials of its columns; a row's four
//            lanes bring them together at the end
//   sweep 2: z again, to the same bits -> p, registers -> a tile in shared memory -> mean over the
//            group's heads -> scores of blocks, f32 [queries, blocks], shared, for all of the item
//   choice:  a warp a query finds the lowest score to take bit by bit, and writes the mask
//
// Keys in bf16 (NSA's) are multiplied as they are. Keys in double (InfLLM-V2's, pooled) become two
// parts in f16, high + low = 32 key, with 22 bits; the query, in f16 as well, is exact between
// 2^-17 and 65504. Products are exact in float, so weights err by rounding of sums in float: 1e-6,
// and blocks whose scores are closer than that may be taken for each other.
//
// Registers: queries (32 where D = 128) and z (32).
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 32768, windows of 32 every 16: 1.07e9 pairs of a row and a
// window; 2 D operations in each part and sweep: 5.5e11, 0.56 ms at 989 TFLOP/s, for bf16 keys,
// 1.1e12, 1.1 ms, for double; an exponential in each sweep: 0.58 ms at 16 a clock and
// multiprocessor, beside it; keys from L2: 2731 items of 16.5 tiles of 16 or 32 KB twice, 1.5 or
// 3 GB, 0.3 or 0.6 ms beside both.
#include <cmath>

#include "kernels/cuda/route_hopper.cuh"
#include "kernels/cuda/selection.cuh"

namespace entrain::cuda {
namespace {

constexpr int groups = 3, threads = (groups + 1) * warpgroup;  // one more copies
constexpr int tile_windows = 64;

/// Queries that a thread block takes together, and the tiles of windows that some of them see.
struct SelectItem {
  int b, r, first;  // batch, kv head, first query
  int tiles;
};

/// A problem as the kernel takes it.
struct HopperSelect {
  int B, Hkv, g, N;
  int first;    // the token that the first query is
  int queries;  // of a warpgroup
  int blocks;   // up to the last query
  Sight sight;
  BlockSelection selection;
  uint32_t* mask;
  int64_t half_words;  // of a row of the mask
  double* read;

  __host__ __device__ int items() const {
    return B * Hkv * ((N + groups * queries - 1) / (groups * queries));
  }
  /// Windows complete at a query.
  __device__ int seen(int query) const { return static_cast<int>(sight.end(first + query)); }
  __device__ int tiles(int query) const { return (seen(query) + tile_windows - 1) / tile_windows; }
  /// Those with most windows come first.
  __device__ SelectItem item(int index) const {
    const int heads = B * Hkv, size = groups * queries, head = index % heads;
    const int at = ((N + size - 1) / size - 1 - index / heads) * size;
    return {head / Hkv, head % Hkv, at, tiles(min(at + size, N) - 1)};
  }
};

/// Shared memory: for each warpgroup a space, which holds its rows of q, then tiles of p; the
/// stages; barriers; scores of blocks, f32 [groups, queries, blocks].
template <int D, int parts>
struct Layout {
  static constexpr int part_bytes = D / 64 * panel_bytes, stage_bytes = parts * part_bytes;
  static constexpr int stages = stage_bytes > 16384 ? 3 : 65536 / stage_bytes;
  static constexpr int stages_at = groups * RowTile::bytes;
  static constexpr int barriers_at = stages_at + stages * stage_bytes;
  static constexpr int own = 2 * stages, barriers = own + groups;
  static constexpr int scores_at = barriers_at + 8 * barriers;
  static_assert(RowTile::bytes % 1024 == 0 && RowTile::bytes >= part_bytes);

  static int64_t shared_bytes(int queries, int blocks) {
    return 1024 + scores_at + int64_t{4} * groups * queries * blocks;
  }
};

/// A warpgroup's rows of q as left operands; of keys in two parts, in f16.
template <int D, int parts>
class WindowRows {
 public:
  __device__ void load(Block block) {
    const int row = static_cast<int>(threadIdx.x) % warpgroup / 32 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      block.left(q_[step], row, step);
#pragma unroll
      for (int x = 0; x < 4 && parts == 2; ++x) {
        const uint32_t both = q_[step][x];
        const __half2 pair =
            __floats2half2_rn(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
        q_[step][x] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
  /// z = q . keys of a stage, the low part first. It may be written again on return.
  __device__ void multiply(float (&z)[8][4], uint32_t stage) const {
    products_fence();
#pragma unroll
    for (int x = 0; x < parts * D / 16; ++x) {
      const int part = parts - 1 - x / (D / 16), step = x % (D / 16);
      const uint64_t keys = Block{stage + part * Layout<D, parts>::part_bytes}.rows(step);
      if constexpr (parts == 1) {
        product<false>(z, q_[step], keys, x > 0);
      } else {
        product_f16(z, q_[step], keys, x > 0);
      }
    }
    products_commit();
    products_wait<0>();
    pin(z);
  }

 private:
  Fragment q_[D / 16];
};

/// The softmax of a lane's two rows, in base 2: first over the lane's columns, then over the row.
class RowSoftmax {
 public:
  __device__ explicit RowSoftmax(float factor) : factor_(factor) {}

  __device__ void add(const float (&z)[8][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(z[j][2 * i], z[j][2 * i + 1]));
      const float old = top_[i];
      top_[i] = fmaxf(old, __fmul_rn(top, factor_));
      const float shift = finite(top_[i]);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum += power_of_2(fmaf(z[j][2 * i], factor_, -shift)) +
               power_of_2(fmaf(z[j][2 * i + 1], factor_, -shift));
      }
      total_[i] = total_[i] * power_of_2(old - shift) + sum;
    }
  }
  /// After the last tile.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = finite(Lanes(4).max(top_[i]));
      offset_[i] = shift + log2f(Lanes(4).sum(total_[i] * power_of_2(top_[i] - shift)));
    }
  }
  /// p of z, in its place.
  __device__ void weigh(float (&z)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) z[j][e] = power_of_2(fmaf(z[j][e], factor_, -offset_[e / 2]));
    }
  }

 private:
  const float factor_;
  float top_[2] = {-INFINITY, -INFINITY}, total_[2] = {0, 0};
  float offset_[2];

  /// What to take from scores before their exponentials where so far the largest is this.
  __device__ static float finite(float top) {
    return top == -INFINITY ? 0 : top;
  }
};

/// Scores of blocks for a warp's queries [first, first + count) of its warpgroup; of its query s,
/// lane s remembers how many windows it sees.
class QueryScores {
 public:
  __device__ QueryScores(const HopperSelect& p, float* of_warpgroup, int query, int first,
                         int count)
      : p_(p),
        scores_(of_warpgroup + first * p.blocks),
        lane_(static_cast<int>(threadIdx.x) % 32),
        query_(query + first),
        first_(first),
        count_(count) {
    seen_ = lane_ < count ? p.seen(query_ + lane_) : 0;
    for (int x = lane_; x < count * p.blocks; x += 32) scores_[x] = 0;
    __syncwarp();
  }
  /// Adds a tile of p, whose means over heads take the place of the queries' first heads.
  __device__ void add(const RowTile& p, int tile) {
    for (int s = 0; s < count_; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 32 * half + lane_;
        *weights(p, s, column) = p.mean(first_ + s, column, p_.g);
      }
    }
    __syncwarp();
    const int from = tile * tile_windows, to = from + tile_windows;
    const int last = min(BlockWindows::last_block(p_.selection, to - 1), p_.blocks - 1);
    for (int c0 = BlockWindows::first_block(p_.selection, from); c0 <= last; c0 += 32) {
      const int c = c0 + lane_;
      const BlockWindows windows(p_.selection, c);
      for (int s = 0; s < count_; ++s) {
        const int end = min(to, __shfl_sync(0xffffffffu, seen_, s));
        if (c > last) continue;
        float& score = scores_[s * p_.blocks + c];
        score = windows.add<float>(score, weights(p, s, 0), from, end);
      }
    }
    __syncwarp();
  }
  /// Writes the queries' masks.
  __device__ void choose_blocks(const SelectItem& item) const {
    const auto block = static_cast<int>(p_.selection.block);
    const int64_t row = (int64_t{item.b} * p_.Hkv + item.r) * p_.N + query_;
    for (int s = 0; s < count_; ++s) {
      choose(p_.selection, scores_ + s * p_.blocks, (p_.first + query_ + s) / block,
             p_.mask + (row + s) * p_.half_words, p_.half_words);
    }
  }

 private:
  __device__ float* weights(const RowTile& p, int s, int column) const {
    return p.at((first_ + s) * p_.g, column);
  }

  const HopperSelect& p_;
  float* const scores_;
  const int lane_, query_, first_, count_;
  int seen_;
};

/// The warp that copies windows ahead, and counts what is read.
template <int D, int parts>
__device__ void copy_windows(const CUtensorMap& high, const CUtensorMap& low, const HopperSelect& p,
                             uint32_t stages, Ring<Layout<D, parts>::stages> ring) {
  using Shape = Layout<D, parts>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_items(p.items(), [&](int index) {
    const SelectItem item = p.item(index);
    if (p.read) {
      int entries = 0;  // whole numbers: the order of adding them does not show
      const int end = min(item.first + groups * p.queries, p.N);
      for (int i = item.first + lane; i < end; i += 32) entries += p.seen(i);
      entries = __reduce_add_sync(0xffffffffu, entries);
      double* fields = p.read + item.r * read_fields;
      if (lane == 0) {
        atomicAdd(fields + read_router, static_cast<double>(entries));
        atomicAdd(fields + read_flops, static_cast<double>(int64_t{2} * entries * p.g * D));
      }
    }
    if (lane != 0) return;
    for (int x = 0; x < 2 * item.tiles; ++x) {
      const int row = x % item.tiles * tile_windows;
      const Block stage{stages + ring.stage * Shape::stage_bytes};
      ring.wait_empty();
      barrier_arrive_expecting(ring.full(), Shape::stage_bytes);
      copy_block<D>(stage, high, ring.full(), row, item.r, item.b);
      if constexpr (parts == 2) {
        copy_block<D>(Block{stage.address + Shape::part_bytes}, low, ring.full(), row, item.r,
                      item.b);
      }
      ring.next();
    }
  });
}

/// One of the warpgroups that choose.
template <int D, int parts>
__device__ void select_rows(const CUtensorMap& q, const HopperSelect& p, char* memory,
                            Ring<Layout<D, parts>::stages> ring) {
  using Shape = Layout<D, parts>;
  const auto thread = static_cast<int>(threadIdx.x);
  const int group = thread / warpgroup, meeting = 1 + group, warp = thread % warpgroup / 32;
  const RowTile space(memory + group * RowTile::bytes);
  const Block own_block{shared_address(space.at(0, 0))};
  float* const scores =
      reinterpret_cast<float*>(memory + Shape::scores_at) + group * p.queries * p.blocks;
  const uint32_t own = ring.barriers + 8 * (Shape::own + group);
  const uint32_t stages = shared_address(memory) + Shape::stages_at;
  const float factor = log2_e / ((parts == 2 ? summary_scale : 1) * sqrtf(D));
  // Where a warp's 16 rows are whole queries, it has its own; else the warpgroup shares them out.
  const bool whole = 16 % p.g == 0;
  const int share = whole ? 16 / p.g : (p.queries + 3) / 4;
  uint32_t own_phase = 0;
  WindowRows<D, parts> rows;
  for_items(p.items(), [&](int index) {
    const SelectItem item = p.item(index);
    const int first = item.first + group * p.queries, count = max(0, min(p.queries, p.N - first));
    const int tiles = count > 0 ? p.tiles(first + count - 1) : 0;

    show_to_engines();
    warpgroup_sync(meeting);  // the last item is done with
    if (thread % warpgroup == 0) {
      barrier_arrive_expecting(own, D / 64 * p.queries * p.g * 128);
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        copy_panel(own_block.address + panel * panel_bytes, q, own, panel * 64, item.r * p.g, first,
                   item.b);
      }
    }
    QueryScores queries(p, scores, first, warp * share, max(0, min(share, count - warp * share)));
    int seen[2];  // by the lane's rows, windows
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = RouteRows<D>::lane_row(i) / p.g;
      seen[i] = query < count ? p.seen(first + query) : 0;
    }
    barrier_wait(own, own_phase);
    own_phase ^= 1;
    rows.load(own_block);
    warpgroup_sync(meeting);  // p takes the place of the rows

    // Calls f(z, tile) for tiles that some query sees.
    auto sweep = [&](auto f) {
      for (int tile = 0; tile < item.tiles; ++tile) {
        float z[8][4];
        ring.wait_full();
        if (tile < tiles) rows.multiply(z, stages + ring.stage * Shape::stage_bytes);
        warp_arrive(ring.empty(ring.stage));
        ring.next();
        if (tile < tiles) f(z, tile);
      }
    };
    RowSoftmax softmax(factor);
    sweep([&](float(&z)[8][4], int tile) {
      const int c0 = tile * tile_windows;
      if (!__all_sync(0xffffffffu, c0 + tile_windows <= min(seen[0], seen[1]))) {
        const int lane_c0 = c0 + thread % 4 * 2;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (lane_c0 + 8 * j + e % 2 >= seen[e / 2]) z[j][e] = -INFINITY;
          }
        }
      }
      softmax.add(z);
    });
    softmax.finish();
    sweep([&](float(&z)[8][4], int tile) {  // weights of windows not seen are not read
      const auto meet_rows = [&] { whole ? __syncwarp() : warpgroup_sync(meeting); };
      softmax.weigh(z);
      space.put(z);
      meet_rows();
      queries.add(space, tile);
      meet_rows();
    });
    queries.choose_blocks(item);
  });
}

template <int D, int parts>
__global__ void __launch_bounds__(threads, 1)
    select(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap high,
           const __grid_constant__ CUtensorMap low, const __grid_constant__ HopperSelect p) {
#ifdef ENTRAIN_HOPPER
  using Shape = Layout<D, parts>;
  const uint32_t at = shared_address(dynamic_shared());
  char* const memory = dynamic_shared() + ((at + 1023) / 1024 * 1024 - at);
  const Ring<Shape::stages> ring{shared_address(memory) + Shape::barriers_at};
  if (threadIdx.x == 0) {
    Ring<Shape::stages>::init(ring.barriers, 4 * groups);
    for (int i = 0; i < groups; ++i) barrier_init(ring.barriers + 8 * (Shape::own + i), 1);
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x / warpgroup == groups) {
    fewer_registers<32>();
    if (threadIdx.x % warpgroup >= 32) return;
    copy_windows<D, parts>(high, low, p, shared_address(memory) + Shape::stages_at, ring);
    return;
  }
  more_registers<160>();
  select_rows<D, parts>(q, p, memory, ring);
#endif
}

/// Whether it fits: fewer queries where the scores of all their blocks leave no room for more.
template <int D, int parts>
bool launch_select(const Tensor& q, const Tensor& keys, HopperSelect p, const Tensor& scratch) {
  using Shape = Layout<D, parts>;
  const int64_t room = SharedMemory::of_device().most - Shape::shared_bytes(0, 0);
  const int64_t fit = room / (Shape::shared_bytes(1, p.blocks) - Shape::shared_bytes(0, 0));
  p.queries = static_cast<int>(std::min<int64_t>(block_rows / p.g, fit));
  if (p.queries == 0) return false;
  const CUtensorMap rows = packed_map(Rows<bf16>(q), q[0], q[1], q[2], D, p.g, p.queries);
  const auto run = [&](const CUtensorMap& high, const CUtensorMap& low) {
    launch("select_blocks", select<D, parts>, std::min(p.items(), multiprocessors()), threads,
           static_cast<size_t>(Shape::shared_bytes(p.queries, p.blocks)), rows, high, low, p);
  };
  if constexpr (parts == 2) {
    const Summaries summaries = prepare_summaries(keys, scratch);
    run(Summaries::map(summaries.high), Summaries::map(summaries.low));
  } else {
    const CUtensorMap map = block_map(Rows<bf16>(keys), keys[0], keys[1], keys[2], D);
    run(map, map);
  }
  return true;
}

}  // namespace

bool select_hopper(const Tensor& q, const Tensor& keys, const BlockSelection& selection,
                   const BlockSet& blocks, const Tensor& scratch, const Tensor& read) {
  const AttentionProblem problem(q, keys, {.keys = selection.runs(), .first = blocks.first});
  const bool split = keys.dtype == DType::f64;
  const bool takes =
      split ? scratch && hopper_takes(problem, {q}) : hopper_takes(problem, {q, keys});
  // A few queries, as while decoding, do not fill its tiles.
  if (!takes || q[2] < 64 || keys[2] == 0 || problem.g > block_rows ||
      selection.block < selection.stride) {
    return false;
  }
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  const HopperSelect p{whole(problem.B),
                       whole(keys[1]),
                       whole(problem.g),
                       whole(problem.N),
                       whole(problem.first),
                       0,
                       whole(ceil_div(blocks.first + problem.N, selection.block)),
                       problem.sight,
                       selection,
                       reinterpret_cast<uint32_t*>(pointer<uint64_t>(blocks.mask)),
                       2 * blocks.mask[3],
                       pointer<double>(read)};
  bool fits = false;
  by_dense_head_dim(problem.D, [&](auto D) {
    fits = split ? launch_select<D, 2>(q, keys, p, scratch) : launch_select<D, 1>(q, keys, p, {});
  });
  return fits;
}

}  // namespace entrain::cuda
