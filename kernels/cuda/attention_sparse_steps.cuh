#pragma once
// Block-sparse dk and dv (attention_sparse_dkdv.cu): the warpgroup that finds and copies what the
// others compute with.
//
// Its four warps have jobs of their own. The finder draws items, finds their queries in the masks
// and lists those of one step after the other, some steps ahead. Two fillers take turns at the
// lists: one looks up where its step's rows are, and reads their numbers, while the stage is still
// in use (where D is 64 and registers suffice: before it fills the stage of its list before), and
// starts the copies as soon as it is free. The fourth warp copies K and V when those of the item
// before have been done with, or, where D is 64, of the one before that.
#include "kernels/cuda/attending_queries.cuh"
#include "kernels/cuda/attention_sparse_items.cuh"

namespace entrain::cuda::sparse_keys {

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
    for (int i = 0; i < fillers; ++i) hand_over({.kind = Step::stop});
  }

 private:
  /// Tells who copies keys and values.
  __device__ void announce(int n) {
    auto& ring = memory_.item_ring;
    barrier_wait_asleep(ring.empty(ring.stage), ring.parity ^ 1);
    if (threadIdx.x % 32 == 0) memory_.items[Memory<D>::own_stages + ring.stage] = n;
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
    List step{};
    step.row0 = static_cast<uint32_t>(item.kv_head * p.N);
    step.b = item.b;
    step.head0 = item.r * static_cast<int>(p.g);
    step.block = block;
    const auto hand_over_step = [&](int count) {
      __syncwarp();
      const int first = memory_.query(handed_), last = memory_.query(handed_ + count - 1);
      const bool whole = first >= seeing.all_begin && last < seeing.all_end;
      step.count = count;
      step.kind = whole ? Step::whole : Step::part;
      hand_over(step);
    };
    const uint32_t bit = 1u << block % 32, without_mask = p.mask ? 0 : ~0u;
    const int64_t words_of_query = 2 * p.words;
    const auto* mask = reinterpret_cast<const uint32_t*>(p.mask) + block / 32 +
                       (item.kv_head * p.N + seeing.begin + lane) * words_of_query;
    uint32_t words[found_together / 32];
    const auto load = [&](int first) {
#pragma unroll
      for (int j = 0; j < found_together / 32; ++j) {
        words[j] = without_mask;
        if (p.mask && first + 32 * j + lane < seeing.end) words[j] = *mask;
        mask += 32 * words_of_query;
      }
    };
    load(seeing.begin);
    for (int i = seeing.begin; i < seeing.end; i += found_together) {
      uint32_t attending[found_together / 32];
#pragma unroll
      for (int j = 0; j < found_together / 32; ++j) {
        attending[j] = __ballot_sync(~0u, words[j] & bit && i + 32 * j + lane < seeing.end);
      }
      load(i + found_together);  // the next ones are on their way meanwhile
#pragma unroll
      for (int j = 0; j < found_together / 32; ++j) {
        if (attending[j] >> lane & 1) {
          memory_.query(found_ + __popc(attending[j] & ((1u << lane) - 1))) = i + 32 * j + lane;
        }
        found_ += __popc(attending[j]);
      }
      while (waiting() >= w_.pack.queries) hand_over_step(w_.pack.queries);
    }
    if (waiting() > 0) hand_over_step(waiting());
    for (int i = 0; i < consumers; ++i) hand_over({.kind = Step::end});
  }
  /// The first queries that have not been, in a list whose place is always free.
  __device__ void hand_over(List list) {
    auto& ring = memory_.list_ring;
    list.first = handed_;
    if (threadIdx.x % 32 == 0) memory_.lists[ring.stage] = list;
    warp_arrive(ring.full());
    ring.next();
    handed_ += list.count;
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
    const int n = memory.items[Memory<D>::own_stages + ring.stage];
    barrier_arrive(ring.empty(ring.stage));
    barrier_wait_asleep(own.empty(own.stage), own.parity ^ 1);  // for most of an item
    memory.items[own.stage] = n;
    if (n < 0) {
      barrier_arrive(own.full());
      return;
    }
    const Item item(w.items, n);
    const int key = item.tile * key_tile;
    barrier_arrive_expecting(own.full(), 2 * Memory<D>::block_bytes);
    copy_block<D>(memory.k(own.stage), maps.k, own.full(), key, item.r, item.b);
    copy_block<D>(memory.v(own.stage), maps.v, own.full(), key, item.r, item.b);
  }
}

/// The work of one of the fillers, a warp.
template <int D>
class Filler {
 public:
  /// mine: 0 or 1.
  __device__ Filler(const Work& w, const Maps& maps, int mine, Memory<D>& memory)
      : w_(w),
        maps_(maps),
        memory_(memory),
        lists_(memory.list_ring),
        ring_(memory.ring),
        douts_(memory.douts) {
    if (mine == 0) return;
    lists_.next();
    ring_.next();
    douts_.next();
  }

  __device__ void run() {
    for (Listed now = read(); now.list.kind != Step::stop;) {
      if constexpr (D == 64) {  // registers for two
        const Listed next = read();
        fill(now);
        now = next;
      } else {
        fill(now);
        now = read();
      }
    }
  }

 private:
  /// A list, and what comes with two rows of its step: the lane-th and the 32nd after it.
  struct Listed {
    List list;
    int place;          // in the ring
    int boxes = 0;      // which are in shared memory
    int copied = 0;     // queries in all of these
    float2 numbers[2];  // on their way; those of the last query where there is none
    float bias[2] = {};
  };

  __device__ Listed read() {
    lists_.wait_full();
    Listed listed;
    listed.place = lists_.stage;
    listed.list = memory_.lists[listed.place];
    for (int i = 0; i < fillers; ++i) lists_.next();
    if (listed.list.kind == Step::end || listed.list.kind == Step::stop) return listed;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_ + 32 * i, nth = min(w_.pack.query(row), listed.list.count - 1);
      // Rows of a batch are fewer than 2^32.
      const uint64_t query = listed.list.row0 + memory_.query(listed.list.first + nth);
      listed.numbers[i] = w_.numbers[query * static_cast<uint32_t>(w_.p.g) + w_.pack.head(row)];
      if (!w_.p.bias) continue;
      listed.bias[i] =
          w_.p.bias[query * static_cast<uint32_t>(w_.p.bias_blocks) + listed.list.block];
    }
    find_boxes(listed, 0);
    if (w_.pack.queries > 32) find_boxes(listed, 32);
    __syncwarp();
    return listed;
  }
  /// Of the step's places [first, first + 32), one a lane. A place without a query has one after
  /// the last: its rows are copied as zeros. A run of neighbours takes two boxes at most: the
  /// largest that it holds, at its begin, and for the rest the smallest that holds this, at its
  /// end. They may overlap, and bring the same there.
  __device__ void find_boxes(Listed& listed, int first) {
    const List& list = listed.list;
    const int place = first + lane_;
    const int query =
        place < list.count ? memory_.query(list.first + place) : static_cast<int>(w_.p.N) + place;
    const int next = __shfl_down_sync(~0u, query, 1);
    const bool is_place = place < w_.pack.queries;
    const uint32_t joined =
        __ballot_sync(~0u, lane_ < 31 && place + 1 < w_.pack.queries && next == query + 1);
    // Of the lane's run, so many are before it and so many from it on.
    const int before = __clz(static_cast<int>(~(joined << (31 - lane_) << 1)));
    const int rest = __ffs(static_cast<int>(~(joined >> lane_)));
    const int largest = 31 - __clz(before + rest);
    const bool begins = is_place && before == 0;
    const bool begins_rest = is_place && before == 1 << largest;
    const int log = begins ? largest : 32 - __clz(rest - 1);
    const int back = begins ? 0 : (1 << log) - rest;
    const uint32_t all = __ballot_sync(~0u, begins || begins_rest);
    if (begins || begins_rest) {
      const int nth = listed.boxes + __popc(all & ((1u << lane_) - 1));
      boxes(listed)[nth] = {query - back, static_cast<uint32_t>((place - back) * bytes_ + log)};
    }
    listed.boxes += __popc(all);
    listed.copied += __reduce_add_sync(~0u, begins || begins_rest ? 1 << log : 0);
  }
  /// Fills the next stage.
  __device__ void fill(const Listed& listed) {
    const List& list = listed.list;
    Step& step = memory_.steps[ring_.stage];
    if (list.kind == Step::end) {
      ring_.wait_empty();
      if (lane_ == 0) step.kind = Step::end;
      warp_arrive(ring_.full());
    } else {
      douts_.wait_empty();
      ring_.wait_empty();
      copy_rows(listed);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane_ + 32 * i, nth = w_.pack.query(row);
        const bool has = nth < list.count;
        step.log_sums[row] =  // where there is no query, P is 0
            has ? listed.numbers[i].x - listed.bias[i] * log2_e : INFINITY;
        step.deltas[row] = has ? listed.numbers[i].y : 0;
        if (list.kind == Step::part) {
          step.seen[row] = has ? seen_by(w_.p, memory_.query(list.first + nth)) : KeyRange{0, 0};
        }
      }
      __syncwarp();
      if (lane_ == 0) {
        step.kind = list.kind;
        // Bytes may arrive before they are expected.
        barrier_arrive_expecting(ring_.full(),
                                 2 * 2 * D * listed.copied * static_cast<int>(w_.p.g));
      }
      for (int i = 0; i < fillers; ++i) douts_.next();
    }
    warp_arrive(lists_.empty(listed.place));
    for (int i = 0; i < fillers; ++i) ring_.next();
  }
  /// Starts copying the list's rows of q and dO to the stages at hand.
  __device__ void copy_rows(const Listed& listed) const {
    const Block q = memory_.q(ring_.stage), dout = memory_.dout(douts_.stage);
    const uint32_t full = ring_.full();
    const int head0 = listed.list.head0, b = listed.list.b;
    const Box* next = boxes(listed);
    if (!elected()) return;
    Box box = *next;
    for (int i = 0; i < listed.boxes; ++i) {
      const Box then = *++next;
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        const uint32_t at = panel * panel_bytes + box.row();
        copy_panel(q.address + at, maps_.q[box.log()], full, panel * 64, head0, box.query, b);
        copy_panel(dout.address + at, maps_.dout[box.log()], full, panel * 64, head0, box.query, b);
      }
      box = then;
    }
  }
  __device__ Box* boxes(const Listed& listed) const {
    return memory_.boxes + listed.place * Memory<D>::list_boxes;
  }

  const Work& w_;
  const Maps& maps_;
  Memory<D>& memory_;
  decltype(Memory<D>::list_ring) lists_;
  decltype(Memory<D>::ring) ring_;
  decltype(Memory<D>::douts) douts_;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const int bytes_ = static_cast<int>(w_.p.g) * 128;  // of a query's rows in a panel
};

/// The work of the warpgroup that copies.
template <int D>
__device__ __forceinline__ void copy_items(const Work& w, const Maps& maps, Memory<D>& memory) {
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  if (warp < fillers) {
    Filler<D>(w, maps, warp, memory).run();
  } else if (warp == fillers) {
    Finder<D>(w, memory).run();
  } else if (threadIdx.x % 32 == 0) {
    copy_keys(w, maps, memory);
  }
}

#endif  // ENTRAIN_HOPPER

}  // namespace entrain::cuda::sparse_keys
