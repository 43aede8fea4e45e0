#pragma once
// Block-sparse dk and dv (attention_sparse_dkdv.cu): how their work is divided into items and these
// into steps, and what of them is in shared memory.
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda::sparse_keys {

constexpr int consumers = 2, threads = (1 + consumers) * warpgroup;
constexpr int fillers = 2;           // warps
constexpr int found_together = 128;  // queries whose masks are looked at together

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
struct alignas(16) List {
  uint32_t first;
  int count;
  Step::Kind kind;
  uint32_t row0;  // the kv head's first query, of the batch's [B, Hkv, N]
  int b, head0;   // its batch and its first head
  int block;      // of keys
};

/// Neighbouring queries of a list, whose rows one copy brings: 2^log of them from `query` on.
struct alignas(8) Box {
  int query;
  uint32_t at;  // their first row in a panel, in bytes, which are a multiple of 128; plus log

  __device__ uint32_t row() const { return at - log(); }
  __device__ uint32_t log() const { return at % 8; }
};

/// Shared memory, and the rings in it.
template <int D>
struct Memory {
  // A step takes a stage for its rows of q and one for those of dO, which is free earlier where D
  // is 128. Stages and lists are even in number: each then is always filled by the same filler, for
  // the same of the warpgroups that compute. Between two that are ahead of each other, a barrier's
  // parity would not tell a phase from the one before the last.
  static constexpr int stages = D == 64 ? 10 : 6, dout_stages = D == 64 ? 10 : 4;
  static constexpr int own_stages = D == 64 ? 2 : 1;  // of K and V
  static constexpr int lists_ahead = 8, items_ahead = 2;
  static_assert(stages % 2 == 0 && dout_stages % 2 == 0 && lists_ahead % 2 == 0);
  // Room for those of all lists, of one to come and for what is found at a time.
  static constexpr int queries_kept = 1024;
  static_assert(queries_kept >= (lists_ahead + 1) * block_rows + found_together);
  static constexpr int block_bytes = D / 64 * panel_bytes;
  // Blocks come first, each at a multiple of 1024.
  static constexpr int barriers_at = (2 * own_stages + stages + dout_stages) * block_bytes;
  static constexpr int steps_at =
      barriers_at + 8 * 2 * (stages + dout_stages + own_stages + lists_ahead + items_ahead);
  static constexpr int lists_at = steps_at + stages * static_cast<int>(sizeof(Step));
  static constexpr int boxes_at = lists_at + lists_ahead * static_cast<int>(sizeof(List));
  static constexpr int list_boxes = block_rows + 1;  // one is read in vain
  static constexpr int queries_at =
      boxes_at + lists_ahead * list_boxes * static_cast<int>(sizeof(Box));
  static constexpr int items_at = queries_at + 4 * queries_kept;
  static constexpr int bytes = 1024 + items_at + 4 * (own_stages + items_ahead);
  static_assert(steps_at % 16 == 0 && bytes <= 227 * 1024);

  char* blocks;
  Step* steps;
  List* lists;
  Box* boxes;         // list_boxes for each list
  int* items;         // the numbers of those whose K and V are here, and of those whose will be
  int* queries;       // the last queries_kept that were found
  Ring<stages> ring;  // of steps
  Ring<dout_stages> douts;      // of their blocks of dO, which are full when the step is
  Ring<own_stages> own;         // of K and V
  Ring<lists_ahead> list_ring;  // of lists
  Ring<items_ahead> item_ring;  // of the numbers of items that wait for their K and V

  __device__ Memory() {
    char* start = dynamic_shared();
    blocks = start + (1024 - shared_address(start) % 1024) % 1024;
    steps = reinterpret_cast<Step*>(blocks + steps_at);
    lists = reinterpret_cast<List*>(blocks + lists_at);
    boxes = reinterpret_cast<Box*>(blocks + boxes_at);
    items = reinterpret_cast<int*>(blocks + items_at);
    queries = reinterpret_cast<int*>(blocks + queries_at);
    ring.barriers = shared_address(blocks) + barriers_at;
    douts.barriers = ring.barriers + 8 * 2 * stages;
    own.barriers = douts.barriers + 8 * 2 * dout_stages;
    list_ring.barriers = own.barriers + 8 * 2 * own_stages;
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
  __device__ Block k(int stage) const { return block(2 * stage); }
  __device__ Block v(int stage) const { return block(2 * stage + 1); }
  __device__ Block q(int stage) const { return block(2 * own_stages + stage); }
  __device__ Block dout(int stage) const { return block(2 * own_stages + stages + stage); }
  __device__ int& query(uint32_t nth) const { return queries[nth % queries_kept]; }
  /// A block, for sums: of a stage's K at 2 stage, of its V at the next.
  __device__ float4* room(int block) const {
    return reinterpret_cast<float4*>(blocks + block * block_bytes);
  }
};

}  // namespace entrain::cuda::sparse_keys
