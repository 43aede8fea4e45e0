#pragma once
// The block-sparse engine on Hopper: what its two halves share that go through the keys, forward
// (attention_sparse_forward.cu) and dq (attention_sparse_dq.cu).
//
// A thread block stays on its multiprocessor and draws items from a counter as it comes free, since
// how long one takes is up to the masks (dealt out beforehand, multiprocessors were idle for a
// quarter of the time); later queries, which see more, come first. Copies run ahead from one item
// to the next. (A thread block for each item, dealt out by the GPU, leaves the start and the end of
// each with nothing beside them: about 5 us of 43.)
//
// An item is neighbouring queries of one kv head: 64 / g of them for each warpgroup, each with the
// g heads of the group one after the other, so that a warpgroup has 64 rows (the last ones of no
// query where g does not divide 64). Its steps are the tiles of 64 keys that some query of the item
// attends. One more warp finds them, in ascending order, and copies their K and V ahead through a
// ring of stages, with a word for each warpgroup that tells which of its queries attend the tile,
// and the queries' biases. A warpgroup passes over tiles that none of its own queries attends: what
// it computes is the union of its 64 / g queries, whatever the others attend.
//
// Blocks are whole tiles, so a query attends all of a tile or nothing, but for what it does not see
// (Sight): at the diagonal, at a window's begin and after the last key.
#include "kernels/cuda/attention_bf16.cuh"
#include "kernels/cuda/attention_hopper.cuh"

namespace entrain::cuda {

/// dk and dv, the half that goes through the queries; attention_sparse_dkdv.cu.
void sparse_key_gradients(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                          const Rows<bf16>& v, const Rows<bf16>& dout, const float2* numbers,
                          void* scratch, const Rows<bf16>& dk, const Rows<bf16>& dv);
/// Bytes of its scratch, at a multiple of 16; those of a problem do for others with fewer keys.
int64_t sparse_key_gradients_scratch(const AttentionProblem& p);

#ifdef __CUDACC__

/// Neighbouring queries of one kv head.
struct SparseItem {
  int b, r, first, count;  // queries [first, first + count)

  __device__ SparseItem(const AttentionProblem& p, int queries, int item) {
    const int N = static_cast<int>(p.N), Hkv = static_cast<int>(p.Hkv);
    const int kv_heads = static_cast<int>(p.B) * Hkv, last = (N - 1) / queries;
    b = item % kv_heads / Hkv;
    r = item % Hkv;
    first = (last - item / kv_heads) * queries;
    count = min(queries, N - first);
  }
  /// Items of so many queries.
  __host__ __device__ static int64_t items(const AttentionProblem& p, int queries) {
    return p.B * p.Hkv * ((p.N + queries - 1) / queries);
  }
  /// Where its first query lies in [B, Hkv, N].
  __device__ int64_t index(const AttentionProblem& p) const {
    return (b * p.Hkv + r) * p.N + first;
  }
};

/// How the warps of a thread block get to know its items: the one that copies keys draws their
/// numbers, and hands each on through one of two places in shared memory.
template <int groups>
class DrawnItems {
 public:
  static constexpr int bytes = 8 * 2 * 2 + 4 * 2;

  /// memory: `bytes` at a multiple of 8. count: the launch's items.
  __device__ DrawnItems(char* memory, int count)
      : places_{shared_address(memory)},
        numbers_(reinterpret_cast<int*>(memory + 8 * 2 * 2)),
        count_(count) {}
  /// By one thread, before barrier_init_done(). All warps of the warpgroups take a number, and one
  /// more for each warpgroup, which copies its rows.
  __device__ void init() const { Ring<2>::init(places_.barriers, 5 * groups); }

  /// Draws, and calls f(number), by the warp that copies keys. Each thread block draws one number
  /// too many, and the last of those sets the counter back to 0 for the next launch.
  template <class F>
  __device__ void draw(unsigned* counter, F f) {
    const bool hands_on = threadIdx.x % 32 == 0;
    for (;;) {
      const auto last = static_cast<unsigned>(count_) + gridDim.x - 1;
      const int number = uniform(hands_on ? static_cast<int>(atomicInc(counter, last)) : 0);
      places_.wait_empty();
      __syncwarp();  // all lanes have seen it empty before it fills
      if (hands_on) {
        numbers_[places_.stage] = number;
        barrier_arrive(places_.full());
      }
      places_.next();
      if (number >= count_) return;
      f(number);
    }
  }
  /// Calls f(number) for the same items, by another warp. asleep: for who has nothing else to do.
  template <class F>
  __device__ void take(F f, bool asleep = false) {
    for (;;) {
      if (asleep) {
        barrier_wait_asleep(places_.full(), places_.parity);
      } else {
        places_.wait_full();
      }
      const int number = uniform(numbers_[places_.stage]);
      warp_arrive(places_.empty(places_.stage));
      places_.next();
      if (number >= count_) return;
      f(number);
    }
  }

 private:
  Ring<2> places_;
  int* numbers_;
  int count_;
};

/// Of 32 words, one a lane, bit t of lane i becomes bit i of lane t: ever smaller squares change
/// places (Warren, Hacker's Delight, 7-3).
__device__ __forceinline__ uint32_t transpose_bits(uint32_t word) {
  uint32_t low = 0x0000ffff;  // columns of a square's left half
#pragma unroll
  for (int half = 16; half > 0; half /= 2, low ^= low << half) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, half);
    const bool lower = threadIdx.x & half;
    word = lower ? (word & ~low) | (other >> half & low) : (word & low) | (other << half & ~low);
  }
  return word;
}

/// What comes with a tile's keys and values.
template <int groups>
struct SparseStep {
  // Of each warpgroup's queries, a bit each: whether it attends some key of the tile. None after an
  // item's last tile.
  uint64_t attending[groups];
  int tile;                         // negative after an item's last one
  float bias[groups * block_rows];  // of the item's queries on the tile's block, where there is one
};

/// The ring of a thread block of `groups` warpgroups, in shared memory.
template <int D, int groups, int stages>
class SparseRing : public Ring<stages> {
 public:
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int bytes =
      stages * (2 * block_bytes + static_cast<int>(sizeof(SparseStep<groups>))) + 8 * 2 * stages;

  /// memory: `bytes` at a multiple of 1024.
  __device__ explicit SparseRing(char* memory)
      : Ring<stages>{shared_address(memory) + bytes - 8 * 2 * stages},
        blocks_(shared_address(memory)),
        steps_(reinterpret_cast<SparseStep<groups>*>(memory + stages * 2 * block_bytes)) {}
  /// By one thread, before barrier_init_done(). Each warp of the warpgroups empties a stage.
  __device__ void init(const AttentionProblem& p) const {
    Ring<stages>::init(this->barriers, 4 * groups, p.bias ? 1 + 32 : 1);
  }

  __device__ Block k(int stage) const { return {blocks_ + 2 * stage * block_bytes}; }
  __device__ Block v(int stage) const { return {blocks_ + (2 * stage + 1) * block_bytes}; }
  /// Of the stage at hand, once it is full.
  __device__ const SparseStep<groups>& step() const { return steps_[this->stage]; }

  /// The copying warp's part of an item.
  __device__ void fill(const AttentionProblem& p, int queries, const SparseItem& item,
                       const CUtensorMap& k_map, const CUtensorMap& v_map) {
    const int lane = static_cast<int>(threadIdx.x) % 32, block = static_cast<int>(p.block);
    const float* biases = p.bias + item.index(p) * p.bias_blocks;
    const int begin = seen_by(p, item.first).begin;
    const int end = seen_by(p, item.first + item.count - 1).end;
    // A lane has a tile of 32. Masks of the next 32 are on their way when these are copied.
    const int first_tile = begin / key_tile / 32 * 32;
    Masks masks;
    masks.load(p, queries / groups, item, first_tile);
    for (int tile0 = first_tile; tile0 * key_tile < end; tile0 += 32) {
      uint64_t attending[groups];
      find_attending(attending, p, queries / groups, item, tile0, masks);
      if ((tile0 + 32) * key_tile < end) masks.load(p, queries / groups, item, tile0 + 32);
      const int block_of_lane = (tile0 + lane) * key_tile / block;
      bool some = false;
#pragma unroll
      for (int w = 0; w < groups; ++w) some = some || attending[w];
      for (uint32_t rest = __ballot_sync(0xffffffffu, some); rest; rest &= rest - 1) {
        const int owner = __ffs(static_cast<int>(rest)) - 1, tile = tile0 + owner;
        const float* of_block = biases + __shfl_sync(0xffffffffu, block_of_lane, owner);
        this->wait_empty();
        __syncwarp();  // all lanes have seen it empty before it fills
        SparseStep<groups>& step = steps_[this->stage];
        if (p.bias) {
          for (int i = lane; i < item.count; i += 32) {
            copy_async<4>(shared_address(step.bias + i), of_block + i * p.bias_blocks, true);
          }
          barrier_arrive_after_copies(this->full());
        }
        if (lane == owner) {
          step.tile = tile;
#pragma unroll
          for (int w = 0; w < groups; ++w) step.attending[w] = attending[w];
          barrier_arrive_expecting(this->full(), 2 * block_bytes);
          copy_block<D>(k(this->stage), k_map, this->full(), tile * key_tile, item.r, item.b);
          copy_block<D>(v(this->stage), v_map, this->full(), tile * key_tile, item.r, item.b);
        }
        this->next();
      }
    }
    this->wait_empty();
    __syncwarp();
    if (p.bias) barrier_arrive_after_copies(this->full());
    if (lane == 0) {
      SparseStep<groups>& end = steps_[this->stage];
      end.tile = -1;
#pragma unroll
      for (int w = 0; w < groups; ++w) end.attending[w] = 0;
      barrier_arrive(this->full());
    }
    this->next();
  }

 private:
  /// Of 32 tiles, which share half a word of each query's mask: the lane's query of each 32 of a
  /// warpgroup's.
  struct Masks {
    uint32_t halves[groups][2];

    __device__ void load(const AttentionProblem& p, int own, const SparseItem& item, int tile0) {
      if (!p.mask) return;
      const int block = static_cast<int>(p.block), lane = static_cast<int>(threadIdx.x) % 32;
      const auto* of_item = reinterpret_cast<const uint32_t*>(p.mask + item.index(p) * p.words) +
                            tile0 * key_tile / block / 32;
#pragma unroll
      for (int w = 0; w < groups; ++w) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 32 * h + lane, query = w * own + i;
          const bool has = i < own && query < item.count;
          halves[w][h] = has ? of_item[query * 2 * p.words] : 0;
        }
      }
    }
  };

  /// Of each warpgroup's `own` queries, those that attend some key of the lane's tile.
  __device__ static void find_attending(uint64_t (&attending)[groups], const AttentionProblem& p,
                                        int own, const SparseItem& item, int tile0,
                                        const Masks& masks) {
    const int tile = tile0 + static_cast<int>(threadIdx.x) % 32;
    const int bit = tile * key_tile / static_cast<int>(p.block) % 32;
#pragma unroll
    for (int w = 0; w < groups; ++w) {
      attending[w] = ~uint64_t{0};
      if (!p.mask) continue;
      // A lane has the bits of a block, whose tiles may be several.
      attending[w] = __shfl_sync(0xffffffffu, transpose_bits(masks.halves[w][0]), bit);
      if (own <= 32) continue;
      attending[w] |= uint64_t{__shfl_sync(0xffffffffu, transpose_bits(masks.halves[w][1]), bit)}
                      << 32;
    }
    // Of the item, queries [first, last) see some of the tile.
    const int64_t token = p.first + item.first, key = int64_t{tile} * key_tile;
    const auto place = [&](int64_t t) {
      return static_cast<int>(min(max(t - token, int64_t{0}), int64_t{item.count}));
    };
    const int first = place(p.sight.first_token(key));
    const int last = place(p.sight.last_token(key + key_tile - 1));
#pragma unroll
    for (int w = 0; w < groups; ++w) {
      attending[w] &= bits_below(min(own, last - w * own)) & ~bits_below(first - w * own);
    }
  }

  uint32_t blocks_;
  SparseStep<groups>* steps_;
};

/// Starts copying a warpgroup's rows of x, whose first query is `first`; they are
/// packed_bytes<D>() then. Rows of no query are left as they are.
template <int D>
__device__ __forceinline__ void copy_packed(Block to, const CUtensorMap& map, uint32_t barrier,
                                            const AttentionProblem& p, const SparseItem& item,
                                            int first) {
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    copy_panel(to.address + panel * panel_bytes, map, barrier, panel * 64,
               item.r * static_cast<int>(p.g), first, item.b);
  }
}
/// Has the second-level cache read them.
template <int D>
__device__ __forceinline__ void prefetch_packed(const CUtensorMap& map, const AttentionProblem& p,
                                                const SparseItem& item, int first) {
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    prefetch_panel(map, panel * 64, item.r * static_cast<int>(p.g), first, item.b);
  }
}
template <int D>
__device__ __forceinline__ int packed_bytes(const PackedRows& pack) {
  return pack.heads * pack.queries * 2 * D;
}

/// A thread's two rows of its warpgroup's 64.
struct OwnRows {
  int first;              // query of the warpgroup
  int query[2], head[2];  // query - first, head of the group
  bool has[2];            // false: the row is of no query
  KeyRange seen[2];
  KeyRange all;  // seen by all rows of the warp

  __device__ OwnRows(const AttentionProblem& p, const PackedRows& pack, int first_query)
      : first(first_query) {
    const int N = static_cast<int>(p.N), thread = static_cast<int>(threadIdx.x) % warpgroup;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = thread / 32 * 16 + i * 8 + thread % 32 / 4;
      query[i] = pack.query(row);
      head[i] = pack.head(row);
      has[i] = query[i] < pack.queries && first + query[i] < N;
      seen[i] = seen_by(p, min(first + query[i], N - 1));
    }
    all = {__reduce_max_sync(~0u, max(seen[0].begin, seen[1].begin)),
           __reduce_min_sync(~0u, min(seen[0].end, seen[1].end))};
  }
  /// Where row i lies in [B, Hq, N].
  __device__ int64_t index(const AttentionProblem& p, const SparseItem& item, int i) const {
    return (item.b * p.Hq + item.r * p.g + head[i]) * p.N + first + query[i];
  }
  /// What is of keys of a tile that a row does not see becomes `hidden`: of scores, -infinity.
  __device__ void hide_unseen(float (&s)[8][4], int tile, float hidden = -INFINITY) const {
    const int key0 = tile * key_tile, key = key0 + static_cast<int>(threadIdx.x) % 4 * 2;
    if (all.begin <= key0 && key0 + key_tile <= all.end) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = key + 8 * j + e % 2;
        if (at < seen[e / 2].begin || at >= seen[e / 2].end) s[j][e] = hidden;
      }
    }
  }
  /// Writes, or adds, sums times a factor for each row to rows of x.
  template <int n>
  __device__ void store(const float (&sum)[n][4], const float (&factor)[2], const Rows<bf16>& x,
                        const AttentionProblem& p, const SparseItem& item, bool add) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!has[i]) continue;
      bf16* at = x.at(item.b, item.r * p.g + head[i], first + query[i]) + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        auto* pair = reinterpret_cast<__nv_bfloat162*>(at + 8 * j);
        float2 y = add ? __bfloat1622float2(*pair) : make_float2(0, 0);
        y.x += sum[j][2 * i] * factor[i];
        y.y += sum[j][2 * i + 1] * factor[i];
        *pair = __floats2bfloat162_rn(y.x, y.y);
      }
    }
  }
};

#endif  // __CUDACC__

}  // namespace entrain::cuda
