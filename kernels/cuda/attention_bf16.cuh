#pragma once
// What the bf16 attention kernels share: rows of a group's heads packed into tiles, and which keys
// each query attends.
//
// All kernels have 4 warps and work on tiles of 64 keys, those whose number is 64 t and on. A word
// of a mask, 64 blocks, covers whole tiles whatever the block, so a tile needs one word. Numbers of
// tokens and keys are 32 bits wide, which check_sizes() sees to.
//
// Sums and operands take almost all registers; where D is 64 or more, a few addresses are spilled
// and read back once a tile.
#include <cmath>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_tiles.cuh"

namespace entrain::cuda {

constexpr int key_tile = 64;

/// Calls f with head_dim rounded up to what kernels are compiled for; what is added is zeros.
template <class F>
void by_head_dim(int64_t D, F f) {
  if (D <= 32) return f(std::integral_constant<int, 32>{});
  if (D <= 64) return f(std::integral_constant<int, 64>{});
  if (D <= 128) return f(std::integral_constant<int, 128>{});
  f(std::integral_constant<int, 256>{});
}

/// The problem with a block that 32 bits hold, where one block holds all keys anyway.
inline AttentionProblem check_sizes(AttentionProblem p) {
  constexpr int64_t most = 1 << 30;
  if (p.first + p.N > most || p.sight.length > most || p.sight.stride > most) {
    fail("attention over more than 2^30 tokens");
  }
  p.block = std::min(p.block, most);
  return p;
}

/// Whether rows can be copied 16 bytes at a time, else 4; throws where neither.
inline bool wide_rows(const AttentionProblem& p, std::initializer_list<Rows<bf16>> tensors) {
  bool wide = p.D % 8 == 0;
  for (const Rows<bf16>& x : tensors) {
    const auto address = reinterpret_cast<uintptr_t>(x.data);
    const int64_t steps = x.batch_step | x.head_step | x.token_step;
    if (address % 4 != 0 || steps % 2 != 0) fail("attention: rows of bf16 must lie at 4 bytes");
    if (p.Hq * x.head_step + std::max(p.N, p.keys) * x.token_step >= int64_t{1} << 31) {
      fail("attention: more than 2^31 elements of bf16 in a batch's heads");
    }
    wide = wide && address % 16 == 0 && steps % 8 == 0;
  }
  return wide;
}

/// Blocks that a tile of keys meets at most.
inline int blocks_of_tile(int64_t block) {
  if (block % key_tile == 0) return 1;
  return static_cast<int>(key_tile % block == 0 ? key_tile / block : (key_tile - 1) / block + 2);
}

/// Rows of a tile are queries, each with the heads of a group one after the other: the group reads
/// a tile of keys once. A group that is larger than the tile is split.
struct PackedRows {
  int heads, queries;  // of a tile
  uint32_t reciprocal;

  PackedRows(int64_t g, int rows)
      : heads(static_cast<int>(std::min<int64_t>(g, rows))),
        queries(rows / heads),
        reciprocal((1u << 16) / static_cast<uint32_t>(heads) + 1) {}
  /// row / heads, for rows and heads up to 128. The tile's last rows may belong to no query.
  __device__ int query(uint32_t row) const { return static_cast<int>(row * reciprocal >> 16); }
  __device__ int head(uint32_t row) const { return static_cast<int>(row) - query(row) * heads; }
};

/// Starts copying a tile of keys or values.
template <int D>
__device__ __forceinline__ void copy_keys(SharedTile<D> to, const HeadRows& from, int tile,
                                          const AttentionProblem& p, bool wide) {
  for_chunks<key_tile, D>(wide, [&](int row, int d, auto w) {
    const int key = tile * key_tile + row;
    copy_chunk<w>(to, row, d, from.at(0, key), key < static_cast<int>(p.keys),
                  static_cast<int>(p.D));
  });
}

/// The lowest n bits, none of them for n < 0, all for n > 64.
__device__ __forceinline__ uint64_t bits_below(int n) {
  return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : ~(~uint64_t{0} << n);
}

/// Keys [begin, end).
struct KeyRange {
  int begin, end;
};

/// What a query sees of the keys. Divides in 32 bits, which is much the faster.
__device__ __forceinline__ KeyRange seen_by(const AttentionProblem& p, int query) {
  const int64_t after = p.first + query + 1 - p.sight.length;  // tokens after the first run
  const auto end =
      after < 0 ? 0 : static_cast<uint32_t>(after) / static_cast<uint32_t>(p.sight.stride) + 1;
  return {static_cast<int>(p.sight.begin(end)), static_cast<int>(end)};
}

/// Of a tile of keys, those that a query attends, a bit each. word: of the query's mask.
__device__ __forceinline__ uint64_t attended_keys(const AttentionProblem& p, uint64_t word,
                                                  KeyRange seen, int tile) {
  const int key0 = tile * key_tile, block = static_cast<int>(p.block);
  const uint64_t keys = bits_below(seen.end - key0) & ~bits_below(seen.begin - key0);
  if (!p.mask || !keys) return keys;
  uint64_t attended = 0;
  for (int c = key0 / block; c * block < min(seen.end, key0 + key_tile); ++c) {
    if (!(word >> (c % 64) & 1)) continue;
    attended |= bits_below((c + 1) * block - key0) & ~bits_below(c * block - key0);
  }
  return keys & attended;
}

/// The queries of a thread block that goes through the keys: forward and dq. Later queries see more
/// keys and start first.
struct QueryTile {
  PackedRows pack;
  int g, b, r, first, count;  // queries [first, first + count) of kv head r
  int head0;                  // of the group

  __device__ QueryTile(const AttentionProblem& p, const PackedRows& packing, int first_head)
      : pack(packing), g(static_cast<int>(p.g)), head0(first_head) {
    const int N = static_cast<int>(p.N), Hkv = static_cast<int>(p.Hkv);
    const int groups = static_cast<int>(p.B) * Hkv, group = static_cast<int>(blockIdx.x) % groups;
    const int last = (N - 1) / pack.queries;
    b = group / Hkv;
    r = group % Hkv;
    first = (last - static_cast<int>(blockIdx.x) / groups) * pack.queries;
    count = min(pack.queries, N - first);
  }
  __host__ static int64_t tiles(const AttentionProblem& p, const PackedRows& pack) {
    return p.B * p.Hkv * ceil_div(p.N, pack.queries);
  }
  __device__ bool has(int row) const {
    return pack.query(row) < count && head0 + pack.head(row) < g;
  }
  __device__ int query(int row) const { return first + pack.query(row); }
  /// Rows of the tile's heads in a tensor like q, for at().
  __device__ HeadRows heads(const Rows<bf16>& x) const { return {x, b, r * g + head0}; }
  __device__ bf16* at(const HeadRows& x, int row) const { return x.at(pack.head(row), query(row)); }
  /// Starts copying the rows of x.
  template <int rows, int D>
  __device__ void copy(const Rows<bf16>& x, SharedTile<D> to, int head_dim, bool wide) const {
    const HeadRows from = heads(x);
    for_chunks<rows, D>(wide, [&](int row, int d, auto w) {
      copy_chunk<w>(to, row, d, at(from, row), has(row), head_dim);
    });
  }
  /// Where a row's value lies in [B, Hq, N].
  __device__ int64_t index(const AttentionProblem& p, int row) const {
    return (b * p.Hq + r * g + head0 + pack.head(row)) * p.N + query(row);
  }
  /// Where its first query lies in [B, Hkv, N].
  __device__ int64_t index(const AttentionProblem& p) const {
    return (b * p.Hkv + r) * p.N + first;
  }
};

/// Which keys the queries of a tile attend and with what bias, in shared memory: one tile of keys
/// ahead of the computation, in one of two places. Thread i looks after query i.
class AttendedKeys {
 public:
  static size_t bytes(const AttentionProblem& p, const PackedRows& pack) {
    const size_t biases = p.bias ? static_cast<size_t>(pack.queries) + 1 : 0;
    return sizeof(uint64_t) * (2 * attention_threads + static_cast<size_t>(p.mask ? p.words : 0)) +
           sizeof(float) * 2 * biases * static_cast<size_t>(blocks_of_tile(p.block));
  }

  /// All threads call it; a barrier must follow. blocks: blocks_of_tile().
  __device__ AttendedKeys(const AttentionProblem& p, const QueryTile& queries, int blocks,
                          char* shared)
      : p_(p),
        queries_(queries),
        blocks_(blocks),
        keys_(reinterpret_cast<uint64_t*>(shared)),
        any_(keys_ + 2 * attention_threads),
        biases_(reinterpret_cast<float*>(any_ + (p.mask ? p.words : 0))),
        seen_(seen_by(p, queries.first + min(static_cast<int>(threadIdx.x), queries.count - 1))) {
    const int begin = seen_by(p, queries.first).begin;
    const int end = seen_by(p, queries.first + queries.count - 1).end;
    first_ = begin / key_tile;
    end_ = (end + key_tile - 1) / key_tile;
    if (!p.mask || first_ >= end_) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int w = word_of(first_) + warp; w <= word_of(end_ - 1); w += attention_threads / 32) {
      uint64_t any = 0;
      for (int i = lane; i < queries.count; i += 32) any |= mask(i)[w];
      any = warp_or(any);
      if (lane == 0) any_[w] = any;
    }
  }

  /// Shared memory from here on is free.
  __device__ char* after() const {
    const int biases = p_.bias ? 2 * (queries_.pack.queries + 1) * blocks_ : 0;
    return reinterpret_cast<char*>(biases_ + biases);
  }
  __device__ int first() const { return first_; }
  __device__ int end() const { return end_; }
  /// The first tile of keys, from this one on, with a block that some query attends; end() or more
  /// where there is none.
  __device__ int from(int tile) const {
    if (!p_.mask || tile >= end_) return tile;
    int word = word_of(tile);
    uint64_t bits = any_[word] & ~bits_below(tile * key_tile / block() % 64);
    while (!bits && word < word_of(end_ - 1)) bits = any_[++word];
    if (!bits) return end_;
    const int64_t c = word * 64 + __ffsll(static_cast<int64_t>(bits)) - 1;
    return max(tile, static_cast<int>(min(c * block() / key_tile, int64_t{end_})));
  }

  /// All threads call it, before the barrier after which `place` is used.
  __device__ void prepare(int tile, int place) {
    const int i = static_cast<int>(threadIdx.x);
    uint64_t keys = 0;
    if (i < queries_.count) {
      keys = attended_keys(p_, p_.mask ? mask(i)[word_of(tile)] : 0, seen_, tile);
    }
    keys_[place * attention_threads + i] = keys;
    if (!p_.bias) return;
    const float* biases = p_.bias + queries_.index(p_) * p_.bias_blocks;
    for (int x = i; x < queries_.count * blocks_; x += attention_threads) {
      const int query = x / blocks_, j = x - query * blocks_, c = tile * key_tile / block() + j;
      copy_async<4>(shared_address(&bias(place, query, j)), biases + query * p_.bias_blocks + c,
                    c * block() < static_cast<int>(p_.keys));
    }
  }
  /// The keys of the tile that a query attends, a bit each. Rows that belong to no query are one
  /// more query, which attends nothing.
  __device__ uint64_t of(int place, int query) const {
    return keys_[place * attention_threads + query];
  }
  /// The bias of a query on a block of the tile.
  __device__ float& bias(int place, int query, int block) const {
    return biases_[(place * (queries_.pack.queries + 1) + query) * blocks_ + block];
  }
  __device__ bool biased() const { return p_.bias != nullptr; }
  /// Blocks of a tile, and the one that the tile's key x lies in.
  __device__ int blocks() const { return blocks_; }
  __device__ int block_of(int tile, int x) const {
    return (tile * key_tile % block() + x) / block();
  }
  __device__ int block() const { return static_cast<int>(p_.block); }

 private:
  __device__ int word_of(int tile) const { return tile * key_tile / block() / 64; }
  __device__ const uint64_t* mask(int query) const {
    return p_.mask + (queries_.index(p_) + query) * p_.words;
  }

  const AttentionProblem& p_;
  const QueryTile& queries_;
  int blocks_;
  uint64_t *keys_, *any_;  // any_: the queries' masks, or'ed
  float* biases_;
  KeyRange seen_;  // by the thread's query
  int first_, end_;
};

/// What the rows of a warp attend of a tile of keys.
template <int slabs>
class AttendingRows {
 public:
  __device__ AttendingRows(const AttendedKeys& attended, const PackedRows& pack, int place)
      : attended_(attended), pack_(pack), place_(place) {
    bool some = false, part = false;
#pragma unroll
    for (int m = 0; m < slabs; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint64_t keys = attended.of(place, query(m, i));
        off_[m][i] = keys == 0;
        some = some || keys;
        part = part || (keys && ~keys);
      }
    }
    any_ = __any_sync(0xffffffffu, some);
    part_ = __any_sync(0xffffffffu, part);
  }

  /// Whether a row of the warp attends something.
  __device__ bool any() const {
    return any_;
  }
  __device__ bool off(int m, int i) const {
    return off_[m][i];
  }

  /// Makes scores of a tile's keys [key, key + 8 n) -infinity where a row attends only others, and
  /// adds the biases that load_biases() does not give, in the scores' scale: times root_D.
  template <int n>
  __device__ void mask(float (&s)[slabs][n][4], int tile, int key, float root_D) const {
    const int x0 = key + static_cast<int>(threadIdx.x) % 4 * 2;
    const bool biases = attended_.biased() && attended_.blocks() > 1;
    if (biases) {
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) {
        const int block = attended_.block_of(tile, x0 + j / 2 * 8 + j % 2);
#pragma unroll
        for (int row = 0; row < 2 * slabs; ++row) {
          const float bias = attended_.bias(place_, query(row / 2, row % 2), block);
          s[row / 2][j / 2][row % 2 * 2 + j % 2] += bias * root_D;
        }
      }
    }
    if (!part_ && !biases) return;  // a bias without a key may be anything
#pragma unroll
    for (int row = 0; row < 2 * slabs; ++row) {
      const uint64_t keys = attended_.of(place_, query(row / 2, row % 2)) >> x0;
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) {
        if (!(keys >> (j / 2 * 8 + j % 2) & 1)) s[row / 2][j / 2][row % 2 * 2 + j % 2] = -INFINITY;
      }
    }
  }
  /// The rows' biases where all keys of a tile share one.
  __device__ void load_biases(float (&bias)[slabs][2]) const {
    const bool one = attended_.biased() && attended_.blocks() == 1;  // asked once, not a row
#pragma unroll
    for (int row = 0; row < 2 * slabs; ++row) bias[row / 2][row % 2] = 0;
    if (!one) return;
#pragma unroll
    for (int row = 0; row < 2 * slabs; ++row) {
      bias[row / 2][row % 2] = attended_.bias(place_, query(row / 2, row % 2), 0) * log2_e;
    }
  }

 private:
  __device__ int query(int m, int i) const {
    return pack_.query(row_of<slabs>(m, i));
  }

  const AttendedKeys& attended_;
  const PackedRows& pack_;
  int place_;
  bool any_, part_;
  bool off_[slabs][2];
};

/// Writes a warp's rows of a tile, times a factor for each row.
template <int slabs, int columns>
__device__ __forceinline__ void store_rows(const float (&c)[slabs][columns][4],
                                           const float (&factor)[slabs][2],
                                           const QueryTile& queries, const Rows<bf16>& to,
                                           int head_dim, bool add) {
  const HeadRows heads = queries.heads(to);
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of<slabs>(m, i);
      if (!queries.has(row)) continue;
      bf16* at = queries.at(heads, row);
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        const int d = 8 * j + static_cast<int>(threadIdx.x) % 4 * 2;
        if (d >= head_dim) break;
        auto* pair = reinterpret_cast<__nv_bfloat162*>(at + d);
        float2 x = add ? __bfloat1622float2(*pair) : make_float2(0, 0);
        x.x += c[m][j][2 * i] * factor[m][i];
        x.y += c[m][j][2 * i + 1] * factor[m][i];
        *pair = __floats2bfloat162_rn(x.x, x.y);
      }
    }
  }
}

/// dk and dv, once dq's kernel has left delta: attention_bf16_dkdv.cu.
void attention_key_gradients(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                             const Rows<bf16>& v, const Rows<bf16>& dout, const float* lse,
                             const float* delta, const Rows<bf16>& dk, const Rows<bf16>& dv);

}  // namespace entrain::cuda
