#pragma once
// Block-sparse dk and dv (attention_sparse_dkdv.cu): how their work is divided into items and
// these into steps, and the warpgroup that finds and copies what the others compute with.
//
// Its four warps have jobs of their own. The finder draws items, finds their queries in the masks
// and lists those of one step after the other, some steps ahead. Two fillers take turns at the
// lists: one looks up where its step's rows are, and reads their numbers, while the stage is still
// in use, and starts the copies as soon as it is free. The fourth warp copies K and V when those of
// the item before have been done with.
#include "kernels/cuda/attending_queries.cuh"
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda::sparse_keys {

constexpr int consumers = 2, threads = (1 + consumers) * warpgroup;
constexpr int fillers = 2;           // warps
constexpr int found_together = 256;  // queries whose masks are looked at together

/// How the work is divided.
struct Items {
  int Hkv, kv_heads, tiles;
  int segments, length;  // of a segment, in queries

  /// Segments of 512 steps at most; shorter ones, down to 128 steps, where items would be too few
  /// for a GPU's multiprocessors to end at about the same time.
  explicit Items(const AttentionProblem& p)
      : Hkv(static_cast<int>(p.Hkv)),
        kv_heads(static_cast<int>(p.B * p.Hkv)),
        tiles(static_cast<int>(ceil_div(p.keys, key_tile))) {
    const int64_t enough = 1024, step = block_rows / p.g;
    int64_t steps = 512;
    while (steps > 128 && kv_heads * tiles * ceil_div(p.N, steps * step) < enough) steps /= 2;
    length = static_cast<int>(steps * step);
    segments = static_cast<int>(ceil_div(p.N, length));
  }
  /// Numbers of items, some of which are of segments that do not see the tile.
  __host__ __device__ int count() const { return kv_heads * tiles * segments; }
};

/// How the copy engine finds blocks of k and v, and the rows of a kv head in q and dO: those of a
/// query and of 2, 4, 8, 16 and 32 neighbouring queries.
struct Maps {
  static constexpr int runs = 6;

  CUtensorMap k, v, q[runs], dout[runs];
};

/// The problem as the kernel takes it.
struct Work {
  AttentionProblem p;
  Items items;
  PackedRows pack;
  Rows<bf16> dk, dv;
  const float2* numbers;  // see query_pairs()
  float scale;            // of logits in base e
  int* drawn;             // items so far
  int* passed;            // [kv_heads, tiles, 2]: the segment that dv's, and dk's, sums wait for
  float4* sums;  // [kv_heads, tiles, 2, D / 8, threads of a warpgroup]: those, as they hold them
};

/// What comes with a step's rows.
struct alignas(16) Step {
  // All rows see the whole tile; some do not; no step, the item has ended; nor will others come.
  enum Kind : int { whole, part, end, stop };

  float log_sums[block_rows], deltas[block_rows];  // log sums less what biases add to the logits
  KeyRange seen[block_rows];                       // of a part
  Kind kind;                                       // never stop
};

/// The queries of a step: `count` of those found, from the first-th on.
struct List {
  uint32_t first;
  int count;
  Step::Kind kind;
  int kv_head, b, head0;  // of the batch's kv heads, which is of b; its first head
  int block;              // of keys
};

/// Shared memory, and the rings in it.
template <int D>
struct Memory {
  // A step takes a stage for its rows of q and one for those of dO, which is free earlier where D
  // is 128. Stages and lists are even in number: each then is always filled by the same filler, for
  // the same of the warpgroups that compute. Between two that are ahead of each other, a barrier's
  // parity would not tell a phase from the one before the last.
  static constexpr int stages = D == 64 ? 12 : 6, dout_stages = D == 64 ? 12 : 4;
  static constexpr int lists_ahead = 8, items_ahead = 2;
  static_assert(stages % 2 == 0 && dout_stages % 2 == 0 && lists_ahead % 2 == 0);
  // Room for those of all lists, of one to come and for what is found at a time.
  static constexpr int queries_kept = 1024;
  static_assert(queries_kept >= (lists_ahead + 1) * block_rows + found_together);
  static constexpr int block_bytes = D / 64 * panel_bytes;
  // Blocks come first, each at a multiple of 1024.
  static constexpr int barriers_at = (2 + stages + dout_stages) * block_bytes;
  static constexpr int steps_at =
      barriers_at + 8 * 2 * (stages + dout_stages + 1 + lists_ahead + items_ahead);
  static constexpr int lists_at = steps_at + stages * static_cast<int>(sizeof(Step));
  static constexpr int items_at = lists_at + lists_ahead * static_cast<int>(sizeof(List));
  static constexpr int queries_at = items_at + 4 * (1 + items_ahead);
  static constexpr int bytes = 1024 + queries_at + 4 * queries_kept;

  char* blocks;
  Step* steps;
  List* lists;
  int* items;         // the numbers of the one whose K and V are here, and of those whose will be
  int* queries;       // the last queries_kept that were found
  Ring<stages> ring;  // of steps
  Ring<dout_stages> douts;      // of their blocks of dO, which are full when the step is
  Ring<1> own;                  // of K and V
  Ring<lists_ahead> list_ring;  // of lists
  Ring<items_ahead> item_ring;  // of the numbers of items that wait for their K and V

  __device__ Memory() {
    char* start = dynamic_shared();
    blocks = start + (1024 - shared_address(start) % 1024) % 1024;
    steps = reinterpret_cast<Step*>(blocks + steps_at);
    lists = reinterpret_cast<List*>(blocks + lists_at);
    items = reinterpret_cast<int*>(blocks + items_at);
    queries = reinterpret_cast<int*>(blocks + queries_at);
    ring.barriers = shared_address(blocks) + barriers_at;
    douts.barriers = ring.barriers + 8 * 2 * stages;
    own.barriers = douts.barriers + 8 * 2 * dout_stages;
    list_ring.barriers = own.barriers + 8 * 2;
    item_ring.barriers = list_ring.barriers + 8 * 2 * lists_ahead;
  }
  /// By one thread, before barrier_init_done(). Warps arrive, but for K's and V's, which the copy
  /// engine fills.
  __device__ void init() const {
    ring.init(ring.barriers, 4);
    douts.init(douts.barriers, 4);
    own.init(own.barriers, 4 * consumers);
    list_ring.init(list_ring.barriers, 1);
    item_ring.init(item_ring.barriers, 1);
  }
  __device__ Block block(int i) const { return {shared_address(blocks) + i * block_bytes}; }
  __device__ Block k() const { return block(0); }
  __device__ Block v() const { return block(1); }
  __device__ Block q(int stage) const { return block(2 + stage); }
  __device__ Block dout(int stage) const { return block(2 + stages + stage); }
  __device__ int& query(uint32_t nth) const { return queries[nth % queries_kept]; }
  /// A block, for sums: 0 is K's, 1 is V's.
  __device__ float4* room(int block) const {
    return reinterpret_cast<float4*>(blocks + block * block_bytes);
  }
};

#ifdef ENTRAIN_HOPPER

/// A tile of keys of a kv head, and a segment of the queries.
struct Item {
  int kv_head, b, r;  // of the batch's kv heads, which is r of b
  int tile, segment;

  __device__ Item(const Items& items, int n) {
    const int first_tiles = items.kv_heads * items.segments, rest = n - first_tiles;
    const int place = rest < 0 ? n : rest / (items.tiles - 1);
    kv_head = place % items.kv_heads;
    segment = place / items.kv_heads;
    tile = rest < 0 ? 0 : 1 + rest % (items.tiles - 1);
    b = kv_head / items.Hkv;
    r = kv_head % items.Hkv;
  }
};

/// The segments that see a tile; where no query does, the first one stands in.
struct SeeingSegments {
  int first, last;

  __device__ SeeingSegments(const AttentionProblem& p, const Items& items, int tile) {
    const int64_t key = int64_t{tile} * key_tile, last_key = min(key + key_tile, p.keys) - 1;
    const auto segment_at = [&](int64_t token) {
      return static_cast<int>(max(int64_t{0}, min(token - p.first, p.N - 1))) / items.length;
    };
    first = segment_at(p.sight.first_token(key));
    last = max(first, segment_at(p.sight.last_token(last_key) - 1));
  }
  __device__ bool has(int segment) const { return segment >= first && segment <= last; }
};

/// By a warp: draws the next item, or a number behind the last.
__device__ __forceinline__ int draw_item(const Work& w) {
  const auto is_there = [&](int n) {
    const Item item(w.items, n);
    return SeeingSegments(w.p, w.items, item.tile).has(item.segment);
  };
  int n = 0;
  do {
    if (threadIdx.x % 32 == 0) n = atomicAdd(w.drawn, 1);
    n = uniform(n);
  } while (n < w.items.count() && !is_there(n));
  return n;
}

/// The finder's work, of a warp.
template <int D>
class Finder {
 public:
  __device__ Finder(const Work& w, Memory<D>& memory) : w_(w), memory_(memory) {}

  __device__ void run() {
    for (int n; (n = draw_item(w_)) < w_.items.count();) {
      announce(n);
      find(Item(w_.items, n));
    }
    announce(-1);
    for (int i = 0; i < fillers; ++i) hand_over(0, Step::stop);
  }

 private:
  /// Tells who copies keys and values.
  __device__ void announce(int n) {
    auto& ring = memory_.item_ring;
    barrier_wait_asleep(ring.empty(ring.stage), ring.parity ^ 1);
    if (threadIdx.x % 32 == 0) memory_.items[1 + ring.stage] = n;
    warp_arrive(ring.full());
    ring.next();
  }
  /// Hands over an item's queries, step by step, then an end for each who computes.
  __device__ void find(const Item& item) {
    const auto& p = w_.p;
    const int lane = static_cast<int>(threadIdx.x) % 32, begin = item.segment * w_.items.length;
    const SeeingQueries seeing(p, item.tile, begin,
                               min(begin + w_.items.length, static_cast<int>(p.N)));
    // Blocks are whole tiles: of a tile, masks have one bit.
    const int block = item.tile * key_tile / static_cast<int>(p.block);
    const int64_t step = 2 * p.words;
    const auto* masks =
        reinterpret_cast<const uint32_t*>(p.mask) + item.kv_head * p.N * step + block / 32;
    const auto hand_over_step = [&](int count) {
      __syncwarp();
      const int first = memory_.query(handed_), last = memory_.query(handed_ + count - 1);
      const bool whole = first >= seeing.all_begin && last < seeing.all_end;
      if (lane == 0) {
        List& list = memory_.lists[memory_.list_ring.stage];
        list.kv_head = item.kv_head;
        list.b = item.b;
        list.head0 = item.r * static_cast<int>(p.g);
        list.block = block;
      }
      hand_over(count, whole ? Step::whole : Step::part);
    };
    for (int i = seeing.begin; i < seeing.end; i += found_together) {
      uint32_t words[found_together / 32];
#pragma unroll
      for (int j = 0; j < found_together / 32; ++j) {
        words[j] = p.mask ? masks[min(i + 32 * j + lane, seeing.end - 1) * step] : ~0u;
      }
#pragma unroll
      for (int j = 0; j < found_together / 32; ++j) {
        const int query = i + 32 * j + lane;
        const bool attends = query < seeing.end && words[j] >> block % 32 & 1;
        const uint32_t all = __ballot_sync(~0u, attends);
        if (attends) memory_.query(found_ + __popc(all & ((1u << lane) - 1))) = query;
        found_ += __popc(all);
      }
      while (waiting() >= w_.pack.queries) hand_over_step(w_.pack.queries);
    }
    if (waiting() > 0) hand_over_step(waiting());
    for (int i = 0; i < consumers; ++i) hand_over(0, Step::end);
  }
  /// So many queries in the list at hand, whose place is always free.
  __device__ void hand_over(int count, Step::Kind kind) {
    auto& ring = memory_.list_ring;
    if (threadIdx.x % 32 == 0) {
      List& list = memory_.lists[ring.stage];
      list.first = handed_;
      list.count = count;
      list.kind = kind;
    }
    warp_arrive(ring.full());
    ring.next();
    handed_ += count;
    barrier_wait_asleep(ring.empty(ring.stage), ring.parity ^ 1);
  }

  __device__ int waiting() const {
    return static_cast<int>(found_ - handed_);
  }

  const Work& w_;
  Memory<D>& memory_;
  uint32_t found_ = 0, handed_ = 0;  // queries so far
};

/// By one thread: copies items' keys and values. The item's number comes with them, or -1 where
/// there are no more.
template <int D>
__device__ __forceinline__ void copy_keys(const Work& w, const Maps& maps, Memory<D>& memory) {
  auto& own = memory.own;
  auto& ring = memory.item_ring;
  for (;; own.next(), ring.next()) {
    barrier_wait_asleep(ring.full(), ring.parity);
    const int n = memory.items[1 + ring.stage];
    barrier_arrive(ring.empty(ring.stage));
    barrier_wait_asleep(own.empty(0), own.parity ^ 1);  // for most of an item
    memory.items[0] = n;
    if (n < 0) {
      barrier_arrive(own.full());
      return;
    }
    const Item item(w.items, n);
    const int key = item.tile * key_tile;
    barrier_arrive_expecting(own.full(), 2 * Memory<D>::block_bytes);
    copy_block<D>(memory.k(), maps.k, own.full(), key, item.r, item.b);
    copy_block<D>(memory.v(), maps.v, own.full(), key, item.r, item.b);
  }
}

/// Queries of a list, one a lane, from `first` on. A place without a query has one after the last:
/// its rows are copied as zeros.
struct ListedQueries {
  int query;
  int run;  // log2 of how many from here on can come by one copy, since they are neighbours

  template <int D>
  __device__ ListedQueries(const Work& w, const Memory<D>& memory, const List& list, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32, i = first + lane;
    query = i < list.count ? memory.query(list.first + i) : static_cast<int>(w.p.N) + i;
    const int next = __shfl_down_sync(~0u, query, 1);
    const bool more = lane < 31 && i + 1 < w.pack.queries && next == query + 1;
    const uint32_t from_here = __ballot_sync(~0u, more) >> lane;
    run = 31 - __clz(__ffs(static_cast<int>(~from_here)));
  }
  /// By a warp: starts copying their rows to the stages at hand.
  template <int D>
  __device__ void copy(const Work& w, const Maps& maps, const Memory<D>& memory, int first,
                       int head0, int b) const {
    const auto& ring = memory.ring;
    const int g = static_cast<int>(w.p.g);
    const Block q = memory.q(uniform(ring.stage)), dout = memory.dout(uniform(memory.douts.stage));
    const int end = min(32, w.pack.queries - first);
    for (int i = 0; i < end;) {
      const int token = __shfl_sync(~0u, query, i), of = __shfl_sync(~0u, run, i);
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int panel = 0; panel < D / 64; ++panel) {
          const int at = panel * panel_bytes + (first + i) * g * 128;
          copy_panel(q.address + at, maps.q[of], ring.full(), panel * 64, head0, token, b);
          copy_panel(dout.address + at, maps.dout[of], ring.full(), panel * 64, head0, token, b);
        }
      }
      i += 1 << of;
    }
  }
};

/// What comes with a row of a list. Where there is no query the log sum is infinite: the row's P
/// is 0.
struct RowNumbers {
  float log_sum = INFINITY, delta = 0, bias = 0;

  template <int D>
  __device__ RowNumbers(const Work& w, const Memory<D>& memory, const List& list, int row) {
    const int i = w.pack.query(row);
    if (i >= list.count) return;
    const int64_t query = list.kv_head * w.p.N + memory.query(list.first + i);
    const float2 numbers = w.numbers[query * w.p.g + w.pack.head(row)];
    log_sum = numbers.x;
    delta = numbers.y;
    if (w.p.bias) bias = w.p.bias[query * w.p.bias_blocks + list.block];
  }
};

/// A filler's work, of a warp; mine: 0 or 1.
template <int D>
__device__ __forceinline__ void fill_steps(const Work& w, const Maps& maps, int mine,
                                           Memory<D>& memory) {
  auto& lists = memory.list_ring;
  auto& ring = memory.ring;
  auto& douts = memory.douts;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto next = [&](int steps) {
    for (int i = 0; i < steps; ++i) {
      lists.next();
      ring.next();
    }
  };
  if (mine == 1) douts.next();
  for (next(mine);; next(fillers)) {
    lists.wait_full();
    const List& list = memory.lists[lists.stage];
    const Step::Kind kind = list.kind;
    if (kind == Step::stop) return;
    Step& step = memory.steps[ring.stage];
    if (kind == Step::end) {
      ring.wait_empty();
      if (lane == 0) step.kind = kind;
      warp_arrive(ring.full());
      warp_arrive(lists.empty(lists.stage));
      continue;
    }
    // Where things are is found out before there is room for them.
    const ListedQueries queries(w, memory, list, 0);
    const RowNumbers numbers[2] = {{w, memory, list, lane}, {w, memory, list, lane + 32}};
    const int head0 = list.head0, b = list.b;
    douts.wait_empty();
    ring.wait_empty();
    queries.copy(w, maps, memory, 0, head0, b);
    if (w.pack.queries > 32) {
      ListedQueries(w, memory, list, 32).copy(w, maps, memory, 32, head0, b);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane + 32 * i, place = w.pack.query(row);
      step.log_sums[row] = numbers[i].log_sum - numbers[i].bias * log2_e;
      step.deltas[row] = numbers[i].delta;
      if (kind == Step::part) {
        step.seen[row] =
            place < list.count ? seen_by(w.p, memory.query(list.first + place)) : KeyRange{0, 0};
      }
    }
    __syncwarp();
    if (lane == 0) {
      step.kind = kind;
      // Bytes may arrive before they are expected.
      barrier_arrive_expecting(ring.full(), 2 * 2 * D * w.pack.queries * static_cast<int>(w.p.g));
      barrier_arrive(lists.empty(lists.stage));
    }
    for (int i = 0; i < fillers; ++i) douts.next();
  }
}

/// The work of the warpgroup that copies.
template <int D>
__device__ __forceinline__ void copy_items(const Work& w, const Maps& maps, Memory<D>& memory) {
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  if (warp < fillers) {
    fill_steps(w, maps, warp, memory);
  } else if (warp == fillers) {
    Finder<D>(w, memory).run();
  } else if (threadIdx.x % 32 == 0) {
    copy_keys(w, maps, memory);
  }
}

#endif  // ENTRAIN_HOPPER

}  // namespace entrain::cuda::sparse_keys
