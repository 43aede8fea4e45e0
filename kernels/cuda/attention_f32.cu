// Attention over blocks of keys in float32, accurate to float's rounding: what tests and debugging
// compare with. Plain multiply-adds on tiles in shared memory.
//
// A tile has `size` rows of queries (the heads of a group packed query by query, so that a mask
// serves all of them) and `size` keys of one block, 64 and 64 or, for D above 128, 32 and 32. 16
// threads share a row; a thread holds every (threads / 16)-th row and every 16th key of the tile's
// products, and a run of columns of every sixteenth of D. Blocks that no row of a tile attends are
// skipped. Forward is FlashAttention's online softmax (arXiv 2205.14135); backward computes P again
// from lse, once for dq and dbias by tiles of queries and once for dk and dv by tiles of keys, so
// that each sum has one owner and one order.
#include <cmath>

#include "kernels/cuda/attention.cuh"

namespace entrain::cuda {
namespace {

/// Sizes for D up to D_max, and the products of tiles.
template <int D_max, int size_, int threads_>
struct Tile {
  static constexpr int D = D_max, size = size_, threads = threads_;
  static constexpr int row_gap = threads / 16;           // between a thread's rows
  static constexpr int rows = size / row_gap;            // of a thread
  static constexpr int keys = size / 16;                 // of a thread
  static constexpr int columns = D / 16;                 // of a thread, of every row of D
  static constexpr int run = columns < 4 ? columns : 4;  // of them side by side
  static constexpr int step = D + 4, p_step = size + 4;  // from row to row: other banks
  static constexpr int matrix = size * step, p_matrix = size * p_step;  // floats

  using Products = float[rows][keys];
  using Sums = float[rows][columns];

  __device__ static int row(int i) { return threadIdx.x / 16 + i * row_gap; }
  __device__ static int key(int j) { return threadIdx.x % 16 + j * 16; }
  __device__ static int column(int x) {
    return (static_cast<int>(threadIdx.x % 16) + x / run * 16) * run + x % run;
  }

  /// s = a b^T; a and b [size, step].
  __device__ static void multiply_transposed(const float* a, const float* b, Products& s) {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int j = 0; j < keys; ++j) s[i][j] = 0;
    }
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      float4 av[rows], bv[keys];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        av[i] = *reinterpret_cast<const float4*>(a + row(i) * step + d);
      }
#pragma unroll
      for (int j = 0; j < keys; ++j) {
        bv[j] = *reinterpret_cast<const float4*>(b + key(j) * step + d);
      }
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int j = 0; j < keys; ++j) {
          s[i][j] += av[i].x * bv[j].x;
          s[i][j] += av[i].y * bv[j].y;
          s[i][j] += av[i].z * bv[j].z;
          s[i][j] += av[i].w * bv[j].w;
        }
      }
    }
  }

  /// sums += p x; p [size, p_step], x [size, step].
  __device__ static void multiply_add(const float* p, const float* x, Sums& sums) {
#pragma unroll 2
    for (int j = 0; j < size; j += 4) {
      float pv[rows][4];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        *reinterpret_cast<float4*>(pv[i]) =
            *reinterpret_cast<const float4*>(p + row(i) * p_step + j);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Pack<float, run> xv[columns / run];
#pragma unroll
        for (int c = 0; c < columns / run; ++c) {
          xv[c] = *reinterpret_cast<const Pack<float, run>*>(x + (j + e) * step + column(c * run));
        }
#pragma unroll
        for (int i = 0; i < rows; ++i) {
#pragma unroll
          for (int c = 0; c < columns; ++c) sums[i][c] += pv[i][e] * xv[c / run].at[c % run];
        }
      }
    }
  }

  /// to [size, step] = scale times the rows that at(row) points at, zeros beyond D or where null.
  template <class F>
  __device__ static void load(int64_t D_is, float scale, F at, float* to) {
    for (int i = threadIdx.x / 32; i < size; i += threads / 32) {  // a warp a row
      const float* from = at(i);
      for (int d = threadIdx.x % 32; d < D; d += 32) {
        to[i * step + d] = from && d < D_is ? scale * from[d] : 0;
      }
    }
  }
};

/// Sum or maximum over the 16 threads of a row; all of a warp together.
__device__ float row_sum(float x) {
  for (int o = 8; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ float row_max(float x) {
  for (int o = 8; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

/// What of a tile's keys, [key, key + size) of block c, each of its rows attends.
template <int size>
struct Attended {
  int begin[size], end[size];
  float bias[size];

  /// One thread a row; `query` < 0: none. True if any row attends any key. A barrier before, for
  /// what the last tile left in shared memory, and one after.
  __device__ bool find(const AttentionProblem& p, int64_t b, int64_t r, int64_t query, int64_t c,
                       int64_t key) {
    bool any = false;
    __syncthreads();
    if (threadIdx.x < size) {
      int64_t from = 0, to = 0;
      float shift = 0;
      if (query >= 0) {
        const int64_t at = (b * p.Hkv + r) * p.N + query;
        to = p.sight.end(p.first + query);
        from = p.sight.begin(to) - key;
        const int64_t last = key + size < (c + 1) * p.block ? key + size : (c + 1) * p.block;
        to = (to < last ? to : last) - key;
        from = from > 0 ? from : 0;
        any = to > from && (!p.mask || (p.mask[at * p.words + c / 64] >> (c % 64) & 1));
        if (any && p.bias) shift = p.bias[at * p.bias_blocks + c];
      }
      begin[threadIdx.x] = any ? static_cast<int>(from) : 0;
      end[threadIdx.x] = any ? static_cast<int>(to) : 0;
      bias[threadIdx.x] = shift;
    }
    return __syncthreads_or(any);
  }
};

/// A tile of rows of one kv head: the g heads of whole queries, or `size` heads of one query.
struct QueryTile {
  int64_t b, r, first;  // batch, kv head, first query
  int64_t head;         // first head of the group
  int heads, rows;      // of each query; in all

  __device__ int64_t query(int row) const { return row < rows ? first + row / heads : -1; }
  __device__ int64_t head_of(const AttentionProblem& p, int row) const {
    return r * p.g + head + row % heads;
  }
  /// The row's place in [B, Hq, N].
  __device__ int64_t at(const AttentionProblem& p, int row) const {
    return (b * p.Hq + head_of(p, row)) * p.N + query(row);
  }
  __device__ float* of(const AttentionProblem& p, const Rows<float>& x, int row) const {
    return row < rows ? x.at(b, head_of(p, row), query(row)) : nullptr;
  }
  /// The blocks [begin, end) of which its queries see something.
  __device__ int64_t begin_block(const AttentionProblem& p) const {
    return p.sight.begin(p.sight.end(p.first + first)) / p.block;
  }
  __device__ int64_t end_block(const AttentionProblem& p) const {
    return (p.sight.end(p.first + first + (rows - 1) / heads) + p.block - 1) / p.block;
  }
};

/// Tiles of whole queries, as many as have `size` rows; where one has more, it takes several.
struct Cut {
  int queries;  // of a tile
  int pieces;   // of a query
  int heads;    // of each query of a tile, less in its last piece
  int64_t tiles, total;

  Cut(const AttentionProblem& p, int size)
      : queries(static_cast<int>(std::max<int64_t>(1, size / p.g))),
        pieces(static_cast<int>(ceil_div(p.g, size))),
        heads(static_cast<int>(std::min<int64_t>(p.g, size))),
        tiles(ceil_div(p.N, queries)),
        total(tiles * p.B * p.Hkv) {}
  /// Longest rows first.
  __device__ QueryTile tile(const AttentionProblem& p, int64_t block, int piece) const {
    const int64_t of_heads = p.B * p.Hkv, head = block % of_heads;
    QueryTile t;
    t.b = head / p.Hkv;
    t.r = head % p.Hkv;
    t.first = (tiles - 1 - block / of_heads) * queries;
    t.head = int64_t{piece} * heads;
    t.heads = static_cast<int>(p.g - t.head < heads ? p.g - t.head : heads);
    t.rows = static_cast<int>(p.N - t.first < queries ? p.N - t.first : queries) * t.heads;
    return t;
  }
};

/// Keys or values [key, last) of one kv head.
template <class Tile>
__device__ void load_keys(const AttentionProblem& p, const Rows<float>& x, int64_t b, int64_t r,
                          int64_t key, int64_t last, float* to) {
  Tile::load(
      p.D, 1, [&](int j) { return key + j < last ? x.at(b, r, key + j) : nullptr; }, to);
}

/// Grid: tiles of queries, times pieces. Shared: Q, K, V, P.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    forward(const AttentionProblem p, const Cut cut, float scale, Rows<float> q, Rows<float> k,
            Rows<float> v, Rows<float> o, float* lse) {
  extern __shared__ __align__(16) float shared[];
  float *qs = shared, *ks = qs + Tile::matrix, *vs = ks + Tile::matrix, *ps = vs + Tile::matrix;
  __shared__ Attended<Tile::size> attended;
  const QueryTile tile =
      cut.tile(p, blockIdx.x / cut.pieces, static_cast<int>(blockIdx.x % cut.pieces));
  Tile::load(
      p.D, scale, [&](int row) { return tile.of(p, q, row); }, qs);

  typename Tile::Sums sums = {};
  float top[Tile::rows], total[Tile::rows];
#pragma unroll
  for (int i = 0; i < Tile::rows; ++i) {
    top[i] = -INFINITY;
    total[i] = 0;
  }
  const int64_t my_query = threadIdx.x < Tile::size ? tile.query(threadIdx.x) : -1;
  for (int64_t c = tile.begin_block(p), end = tile.end_block(p); c < end; ++c) {
    const int64_t last = (c + 1) * p.block < p.keys ? (c + 1) * p.block : p.keys;
    for (int64_t key = c * p.block; key < last; key += Tile::size) {
      if (!attended.find(p, tile.b, tile.r, my_query, c, key)) continue;
      load_keys<Tile>(p, k, tile.b, tile.r, key, last, ks);
      load_keys<Tile>(p, v, tile.b, tile.r, key, last, vs);
      __syncthreads();
      typename Tile::Products s;
      Tile::multiply_transposed(qs, ks, s);
#pragma unroll
      for (int i = 0; i < Tile::rows; ++i) {
        const int row = Tile::row(i), from = attended.begin[row], to = attended.end[row];
        const float shift = attended.bias[row];
        float most = -INFINITY;
#pragma unroll
        for (int j = 0; j < Tile::keys; ++j) {
          const int at = Tile::key(j);
          s[i][j] += shift;
          if (at >= from && at < to) most = fmaxf(most, s[i][j]);  // without NaN, which comes back
        }
        const float old = top[i];
        top[i] = fmaxf(old, row_max(most));
        const float correction = old == top[i] ? 1 : expf(old - top[i]);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < Tile::keys; ++j) {
          const int at = Tile::key(j);
          const float e = at >= from && at < to ? expf(s[i][j] - top[i]) : 0;
          sum += e;
          ps[row * Tile::p_step + at] = e;
        }
        total[i] = total[i] * correction + row_sum(sum);
#pragma unroll
        for (int x = 0; x < Tile::columns; ++x) sums[i][x] *= correction;
      }
      __syncwarp();  // a row of P goes from and to the same 16 threads
      Tile::multiply_add(ps, vs, sums);
    }
  }

#pragma unroll
  for (int i = 0; i < Tile::rows; ++i) {
    const int row = Tile::row(i);
    if (row >= tile.rows) continue;
    const float inverse = total[i] == 0 ? 0 : 1 / total[i];  // an empty row gives 0
    float* to = tile.of(p, o, row);
#pragma unroll
    for (int x = 0; x < Tile::columns; ++x) {
      if (Tile::column(x) < p.D) to[Tile::column(x)] = sums[i][x] * inverse;
    }
    // +infinity makes the backward pass of an empty row exp(-infinity) = 0.
    if (threadIdx.x % 16 == 0) {
      lse[tile.at(p, row)] = total[i] == 0 ? INFINITY : top[i] + logf(total[i]);
    }
  }
}

/// delta = sum over D of o dout; a warp a row of [B, Hq, N].
__global__ void __launch_bounds__(256)
    sum_o_dout(const AttentionProblem p, Rows<float> o, Rows<float> dout, float* delta) {
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= p.B * p.Hq * p.N) return;
  const int64_t i = row % p.N, h = row / p.N % p.Hq, b = row / p.N / p.Hq;
  const float *x = o.at(b, h, i), *y = dout.at(b, h, i);
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < p.D; d += 32) sum += x[d] * y[d];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

/// P and dS of a thread's part of a tile, in place of its S and dP.
template <class Tile>
__device__ void differentiate(const Attended<Tile::size>& attended, const float* lse,
                              const float* delta, typename Tile::Products& s,
                              typename Tile::Products& ds) {
#pragma unroll
  for (int i = 0; i < Tile::rows; ++i) {
    const int row = Tile::row(i), from = attended.begin[row], to = attended.end[row];
    const float shift = attended.bias[row] - lse[row];
#pragma unroll
    for (int j = 0; j < Tile::keys; ++j) {
      const int at = Tile::key(j);
      const bool is = at >= from && at < to;
      s[i][j] = is ? expf(s[i][j] + shift) : 0;
      ds[i][j] = is ? s[i][j] * (ds[i][j] - delta[row]) : 0;
    }
  }
}

/// Grid: tiles of queries; a block takes all pieces of its query, which dbias sums. Shared: Q, dO,
/// K, V, dS.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    backward_queries(const AttentionProblem p, const Cut cut, float scale, Rows<float> q,
                     Rows<float> k, Rows<float> v, Rows<float> dout, const float* lse,
                     const float* delta, const AttentionGrads<float> grads) {
  extern __shared__ __align__(16) float shared[];
  float *qs = shared, *os = qs + Tile::matrix, *ks = os + Tile::matrix, *vs = ks + Tile::matrix;
  float* ps = vs + Tile::matrix;
  __shared__ Attended<Tile::size> attended;
  __shared__ float lses[Tile::size], deltas[Tile::size], block_sums[Tile::size];
  const int64_t blocks = (p.keys + p.block - 1) / p.block;
  for (int piece = 0; piece < cut.pieces; ++piece) {
    const QueryTile tile = cut.tile(p, blockIdx.x, piece);
    float* dbias = grads.dbias;
    if (dbias) dbias += ((tile.b * p.Hkv + tile.r) * p.N + tile.first) * blocks;
    const int queries = tile.rows / tile.heads;
    __syncthreads();  // the last piece is done with
    for (int64_t x = threadIdx.x; dbias && piece == 0 && x < queries * blocks; x += Tile::threads) {
      dbias[x] = 0;
    }
    Tile::load(
        p.D, scale, [&](int row) { return tile.of(p, q, row); }, qs);
    Tile::load(
        p.D, 1, [&](int row) { return tile.of(p, dout, row); }, os);
    if (threadIdx.x < Tile::size) {
      const bool is = threadIdx.x < tile.rows;
      lses[threadIdx.x] = is ? lse[tile.at(p, threadIdx.x)] : 0;
      deltas[threadIdx.x] = is ? delta[tile.at(p, threadIdx.x)] : 0;
    }

    typename Tile::Sums sums = {};
    const int64_t my_query = threadIdx.x < Tile::size ? tile.query(threadIdx.x) : -1;
    for (int64_t c = tile.begin_block(p), end = tile.end_block(p); c < end; ++c) {
      const int64_t last = (c + 1) * p.block < p.keys ? (c + 1) * p.block : p.keys;
      float block_sum[Tile::rows] = {};
      for (int64_t key = c * p.block; key < last; key += Tile::size) {
        if (!attended.find(p, tile.b, tile.r, my_query, c, key)) continue;
        load_keys<Tile>(p, k, tile.b, tile.r, key, last, ks);
        load_keys<Tile>(p, v, tile.b, tile.r, key, last, vs);
        __syncthreads();
        typename Tile::Products s, ds;
        Tile::multiply_transposed(qs, ks, s);
        Tile::multiply_transposed(os, vs, ds);
        differentiate<Tile>(attended, lses, deltas, s, ds);
#pragma unroll
        for (int i = 0; i < Tile::rows; ++i) {
#pragma unroll
          for (int j = 0; j < Tile::keys; ++j) {
            ps[Tile::row(i) * Tile::p_step + Tile::key(j)] = ds[i][j];
            block_sum[i] += ds[i][j];
          }
        }
        __syncwarp();  // a row of dS goes from and to the same 16 threads
        Tile::multiply_add(ps, ks, sums);
      }
      if (!dbias) continue;
#pragma unroll
      for (int i = 0; i < Tile::rows; ++i) {
        const float sum = row_sum(block_sum[i]);
        if (threadIdx.x % 16 == 0) block_sums[Tile::row(i)] = sum;
      }
      __syncthreads();
      if (threadIdx.x < queries) {
        float sum = 0;
        for (int h = 0; h < tile.heads; ++h) sum += block_sums[threadIdx.x * tile.heads + h];
        dbias[threadIdx.x * blocks + c] += sum;
      }
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < Tile::rows; ++i) {
      float* to = tile.of(p, grads.dq, Tile::row(i));
#pragma unroll
      for (int x = 0; x < Tile::columns; ++x) {
        const int d = Tile::column(x);
        if (to && d < p.D) to[d] = (grads.add_dq ? to[d] : 0) + scale * sums[i][x];
      }
    }
  }
}

/// Grid: tiles of keys, those that most queries see first. A block goes over the rows of all
/// queries that may attend one; lanes of a warp that are a row there are a key here. Shared: K, V,
/// Q, dO, and P and then dS, both transposed.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    backward_keys(const AttentionProblem p, int64_t tiles_of_block, float scale, Rows<float> q,
                  Rows<float> k, Rows<float> v, Rows<float> dout, const float* lse,
                  const float* delta, const AttentionGrads<float> grads) {
  extern __shared__ __align__(16) float shared[];
  float *ks = shared, *vs = ks + Tile::matrix, *qs = vs + Tile::matrix, *os = qs + Tile::matrix;
  float* ps = os + Tile::matrix;
  __shared__ Attended<Tile::size> attended;
  __shared__ float lses[Tile::size], deltas[Tile::size];
  const int64_t heads = p.B * p.Hkv, head = blockIdx.x % heads, place = blockIdx.x / heads;
  const int64_t b = head / p.Hkv, r = head % p.Hkv, c = place / tiles_of_block;
  const int64_t key = c * p.block + place % tiles_of_block * Tile::size;
  const int64_t end_of_block = (c + 1) * p.block < p.keys ? (c + 1) * p.block : p.keys;
  const int64_t last = key + Tile::size < end_of_block ? key + Tile::size : end_of_block;
  if (key >= last) return;
  load_keys<Tile>(p, k, b, r, key, last, ks);
  load_keys<Tile>(p, v, b, r, key, last, vs);

  // Queries that see one of the keys, as packed rows.
  const int64_t begin = p.sight.first_token(key) - p.first;
  const int64_t end = p.sight.last_token(last - 1) - p.first;
  const int64_t rows_begin = (begin > 0 ? begin : 0) * p.g,
                rows_end = (end < p.N ? end : p.N) * p.g;
  typename Tile::Sums dk = {}, dv = {};
  for (int64_t at = rows_begin; at < rows_end; at += Tile::size) {
    const int64_t mine = at + threadIdx.x;
    const bool is = threadIdx.x < Tile::size && mine < rows_end;
    if (!attended.find(p, b, r, is ? mine / p.g : -1, c, key)) continue;
    auto of = [&](const Rows<float>& x, int i) {
      const int64_t row = at + i;
      return row < rows_end ? x.at(b, r * p.g + row % p.g, row / p.g) : nullptr;
    };
    Tile::load(
        p.D, scale, [&](int i) { return of(q, i); }, qs);
    Tile::load(
        p.D, 1, [&](int i) { return of(dout, i); }, os);
    if (threadIdx.x < Tile::size) {
      const int64_t row = is ? (b * p.Hq + r * p.g + mine % p.g) * p.N + mine / p.g : 0;
      lses[threadIdx.x] = is ? lse[row] : 0;
      deltas[threadIdx.x] = is ? delta[row] : 0;
    }
    __syncthreads();
    typename Tile::Products s, ds;
    Tile::multiply_transposed(qs, ks, s);
    Tile::multiply_transposed(os, vs, ds);
    differentiate<Tile>(attended, lses, deltas, s, ds);
    auto store_transposed = [&](const typename Tile::Products& x) {
#pragma unroll
      for (int i = 0; i < Tile::rows; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::keys; ++j) {
          ps[Tile::key(j) * Tile::p_step + Tile::row(i)] = x[i][j];
        }
      }
    };
    store_transposed(s);
    __syncthreads();
    Tile::multiply_add(ps, os, dv);
    __syncthreads();
    store_transposed(ds);
    __syncthreads();
    Tile::multiply_add(ps, qs, dk);  // queries carry the scale
  }

#pragma unroll
  for (int i = 0; i < Tile::rows; ++i) {
    const int64_t j = key + Tile::row(i);
    if (j >= last) continue;
    float *dk_row = grads.dk.at(b, r, j), *dv_row = grads.dv.at(b, r, j);
#pragma unroll
    for (int x = 0; x < Tile::columns; ++x) {
      const int d = Tile::column(x);
      if (d >= p.D) continue;
      dk_row[d] = dk[i][x];
      dv_row[d] = dv[i][x];
    }
  }
}

/// Calls f with the Tile that a head_dim takes.
template <class F>
void by_head_dim(int64_t D, F f) {
  if (D <= 32) return f(Tile<32, 64, 256>{});
  if (D <= 64) return f(Tile<64, 64, 256>{});
  if (D <= 128) return f(Tile<128, 64, 256>{});
  f(Tile<256, 32, 128>{});
}

template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, int64_t blocks, int threads, int floats,
            const Args&... args) {
  if (blocks == 0) return;
  const int bytes = floats * static_cast<int>(sizeof(float));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), stream()>>>(args...);
  check_launch(name);
}

}  // namespace

void attention_forward(const AttentionProblem& p, Rows<float> q, Rows<float> k, Rows<float> v,
                       Rows<float> o, float* lse) {
  by_head_dim(p.D, [&]<class Tile>(Tile) {
    const Cut cut(p, Tile::size);
    launch("attention_forward", forward<Tile>, cut.total * cut.pieces, Tile::threads,
           3 * Tile::matrix + Tile::p_matrix, p, cut, p.scale(), q, k, v, o, lse);
  });
}

void attention_backward(const AttentionProblem& p, Rows<float> q, Rows<float> k, Rows<float> v,
                        Rows<float> o, Rows<float> dout, const float* lse, float* delta,
                        const AttentionGrads<float>& grads) {
  launch("sum_o_dout", sum_o_dout, ceil_div(p.B * p.Hq * p.N, 8), 256, 0, p, o, dout, delta);
  by_head_dim(p.D, [&]<class Tile>(Tile) {
    const Cut cut(p, Tile::size);
    const int floats = 4 * Tile::matrix + Tile::p_matrix;
    launch("attention_backward_queries", backward_queries<Tile>, cut.total, Tile::threads, floats,
           p, cut, p.scale(), q, k, v, dout, lse, delta, grads);
    const int64_t tiles_of_block = ceil_div(std::min(p.block, p.keys), Tile::size);
    launch("attention_backward_keys", backward_keys<Tile>,
           p.blocks() * tiles_of_block * p.B * p.Hkv, Tile::threads, floats, p, tiles_of_block,
           p.scale(), q, k, v, dout, lse, delta, grads);
  });
}

}  // namespace entrain::cuda
