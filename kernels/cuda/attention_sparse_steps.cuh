#pragma once
// Block-sparse dk and dv (attention_sparse_dkdv.cu): how their work is divided into items and
// these into steps, and the warpgroup that finds and copies what the others compute with.
#include "kernels/cuda/attending_queries.cuh"
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda::sparse_keys {

constexpr int consumers = 2, threads = (1 + consumers) * warpgroup;

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

/// How the copy engine finds blocks of k and v, and the rows of a kv head in q and dO: a query's,
/// and those of a run of neighbouring queries.
struct Maps {
  CUtensorMap k, v, q, dout, q_run, dout_run;
};

/// Queries of a run: as many as divide a step's into whole runs.
inline int queries_of_run(const PackedRows& pack) {
  int run = 4;
  while (pack.queries % run != 0) run /= 2;
  return run;
}

/// The problem as the kernel takes it.
struct Work {
  AttentionProblem p;
  Items items;
  PackedRows pack;
  int run;  // queries
  Rows<bf16> dk, dv;
  QueryNumbers numbers;
  int64_t padded;  // rows of a head in numbers
  float scale;     // of logits in base e
  int* drawn;      // items so far
  int* passed;     // [kv_heads, tiles, 2]: the segment that dv's, and dk's, sums wait for
  float4* sums;    // [kv_heads, tiles, 2, D / 8, threads of a warpgroup]: those, as they hold them
};

/// What comes with a step's rows.
struct alignas(16) Step {
  enum Kind : int { whole, part, end };  // all rows see the whole tile; some do not; no step

  float log_sums[block_rows], deltas[block_rows], biases[block_rows];
  KeyRange seen[block_rows];  // of a part
  Kind kind;
};

/// Shared memory, and the rings in it.
template <int D>
struct Memory {
  static constexpr int own_stages = 2, stages = D == 64 ? 8 : 4;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  // Blocks come first, each at a multiple of 1024.
  static constexpr int barriers_at = 2 * (own_stages + stages) * block_bytes;
  static constexpr int steps_at = barriers_at + 8 * 2 * (own_stages + stages);
  static constexpr int items_at = steps_at + stages * static_cast<int>(sizeof(Step));
  static constexpr int list_at = items_at + own_stages * 4;
  static constexpr int bytes = 1024 + list_at + 4 * AttendingQueries::ints;

  char* blocks;
  Step* steps;
  int* items;  // the numbers of those whose K and V are here
  int* list;
  Ring<stages> ring;     // of steps
  Ring<own_stages> own;  // of K and V

  __device__ Memory() {
    char* start = dynamic_shared();
    blocks = start + (1024 - shared_address(start) % 1024) % 1024;
    steps = reinterpret_cast<Step*>(blocks + steps_at);
    items = reinterpret_cast<int*>(blocks + items_at);
    list = reinterpret_cast<int*>(blocks + list_at);
    ring.barriers = shared_address(blocks) + barriers_at;
    own.barriers = ring.barriers + 8 * 2 * stages;
  }
  __device__ Block block(int i) const { return {shared_address(blocks) + i * block_bytes}; }
  __device__ Block k(int place) const { return block(2 * place); }
  __device__ Block v(int place) const { return block(2 * place + 1); }
  __device__ Block q(int stage) const { return k(own_stages + stage); }
  __device__ Block dout(int stage) const { return v(own_stages + stage); }
  /// The block of K (which 0) or V (which 1), for sums.
  __device__ float4* own_block(int place, int which) const {
    return reinterpret_cast<float4*>(blocks + (2 * place + which) * block_bytes);
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

/// By one thread: draws the next item and starts copying its keys and values. Its number goes with
/// them, or -1 where there are no more.
template <int D>
__device__ __forceinline__ void draw_item(const Work& w, const Maps& maps,
                                          const Memory<D>& memory) {
  const auto is_there = [&](int n) {
    const Item item(w.items, n);
    return SeeingSegments(w.p, w.items, item.tile).has(item.segment);
  };
  int n;
  do {
    n = atomicAdd(w.drawn, 1);
  } while (n < w.items.count() && !is_there(n));
  const auto& own = memory.own;
  own.wait_empty();
  if (n >= w.items.count()) {
    memory.items[own.stage] = -1;
    barrier_arrive(own.full());
    return;
  }
  memory.items[own.stage] = n;
  const Item item(w.items, n);
  const int key = item.tile * key_tile;
  barrier_arrive_expecting(own.full(), 2 * Memory<D>::block_bytes);
  copy_block<D>(memory.k(own.stage), maps.k, own.full(), key, item.r, item.b);
  copy_block<D>(memory.v(own.stage), maps.v, own.full(), key, item.r, item.b);
}

/// By a warpgroup: starts copying the rows of the queries of a list from `first` on that fill a
/// step. Where these are too few, the others' rows are zeros with an infinite log sum: their P is
/// 0. biases: the tile's, of the kv head's first query.
template <int D>
__device__ __forceinline__ void gather_step(const Work& w, const Maps& maps, const Item& item,
                                            const float* biases, const AttendingQueries& queries,
                                            int first, Memory<D>& memory) {
  constexpr uint32_t panels = D / 64;
  const auto thread = static_cast<int>(threadIdx.x);
  const int g = static_cast<int>(w.p.g), head0 = item.r * g;
  const int count = min(w.pack.queries, queries.count() - first);
  // Where things are is found out before there is room for them.
  const bool whole = queries.whole(first, count);
  const int row = thread % block_rows, query = queries[first + min(w.pack.query(row), count - 1)];
  const bool has = w.pack.query(row) < count;
  const float* number = (thread < block_rows ? w.numbers.log_sums : w.numbers.deltas) +
                        (item.b * w.p.Hq + head0 + w.pack.head(row)) * w.padded + query;
  auto& ring = memory.ring;
  ring.wait_empty();

  Step& step = memory.steps[ring.stage];
  if (thread == 0) {
    step.kind = whole ? Step::whole : Step::part;
    barrier_arrive_expecting(ring.full(), 2 * D / 64 * w.pack.queries * g * 128);
  }
  // A warp issues its threads' copies one by one: each has as many. What they bring may arrive
  // before it is expected. Neighbours in the list often are neighbouring queries: one copy for all.
  const auto token = [&](int nth) {
    return nth < count ? queries[first + nth] : static_cast<int>(w.p.N);
  };
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32 * 4 + threadIdx.x / 32;
       i < 2 * panels * w.pack.queries / w.run; i += warpgroup) {
    const auto panel = static_cast<int>(i / 2 % panels);
    const int nth = static_cast<int>(i / 2 / panels) * w.run, end = nth + w.run;
    const Block block = i % 2 == 0 ? memory.q(ring.stage) : memory.dout(ring.stage);
    const uint32_t to = block.address + panel * panel_bytes + nth * g * 128;
    if (end <= count ? token(end - 1) - token(nth) == w.run - 1 : nth >= count) {
      copy_panel(to, i % 2 == 0 ? maps.q_run : maps.dout_run, ring.full(), panel * 64, head0,
                 token(nth), item.b);
    } else {
#pragma unroll 1
      for (int j = 0; j < w.run; ++j) {
        copy_panel(to + j * g * 128, i % 2 == 0 ? maps.q : maps.dout, ring.full(), panel * 64,
                   head0, token(nth + j), item.b);
      }
    }
  }

  if (thread < block_rows) {
    if (has) {
      copy_async<4>(shared_address(&step.log_sums[row]), number, true);
    } else {
      step.log_sums[row] = INFINITY;
    }
    if (!whole) step.seen[row] = has ? seen_by(w.p, query) : KeyRange{0, 0};
  } else {
    copy_async<4>(shared_address(&step.deltas[row]), number, has);
    if (w.p.bias) {
      copy_async<4>(shared_address(&step.biases[row]), biases + query * w.p.bias_blocks, has);
    }
  }
  barrier_arrive_after_copies(ring.full());
  warp_arrive(ring.full());
  ring.next();
}

/// The work of the warpgroup that copies.
template <int D>
__device__ __forceinline__ void copy_items(const Work& w, const Maps& maps, Memory<D>& memory) {
  const auto thread = static_cast<int>(threadIdx.x);
  for (;; memory.own.next()) {
    if (thread == 0) draw_item(w, maps, memory);
    meet(1, warpgroup);
    const int n = memory.items[memory.own.stage];
    if (n < 0) break;
    const Item item(w.items, n);
    const float* biases = w.p.bias + item.kv_head * w.p.N * w.p.bias_blocks +
                          item.tile * key_tile / static_cast<int>(w.p.block);
    const int begin = item.segment * w.items.length;
    AttendingQueries queries(w.p, item.kv_head, item.tile, begin,
                             min(begin + w.items.length, static_cast<int>(w.p.N)), memory.list);
    while (queries.more()) {
      queries.append();
      // Rows that do not fill a step wait for more.
      const int fill = queries.more() ? 0 : w.pack.queries - 1;
      const int steps = (queries.count() + fill) / w.pack.queries;
      for (int i = 0; i < steps; ++i) {
        gather_step(w, maps, item, biases, queries, i * w.pack.queries, memory);
      }
      meet(1, warpgroup);
      queries.drop(min(steps * w.pack.queries, queries.count()));
    }
    for (int i = 0; i < consumers; ++i) {  // one for each, whose turn it is
      memory.ring.wait_empty();
      if (thread == 0) {
        memory.steps[memory.ring.stage].kind = Step::end;
        barrier_arrive(memory.ring.full());
      }
      barrier_arrive_after_copies(memory.ring.full());
      warp_arrive(memory.ring.full());
      memory.ring.next();
    }
  }
  wait_copies();  // before this thread goes
}

#endif  // ENTRAIN_HOPPER

}  // namespace entrain::cuda::sparse_keys
