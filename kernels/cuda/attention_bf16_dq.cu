// Attention in bf16, backward, first half: dq, dbias, and delta for the second half
// (attention_bf16_dkdv.cu).
//
// P = exp(S - lse) is computed anew, dS = P (dP - delta) with dP = dO V^T and delta = rowsum(o dO);
// dq = dS K / sqrt(D), and dbias sums dS over a block's keys and a group's heads. The pattern is
// that of forward: a block of 4 warps owns 128 rows (64 where D > 64), the g heads of neighbouring
// queries, with q and dO in registers where D <= 64; tiles of 64 keys and values pass through
// shared memory, 32 keys at once through the registers. All heads of a query being here, its sums
// of dS are complete and written once.
//
// Floor: 6 D operations and an exponential for each (row, key) of the tiles. B 16, Hq 8, Hkv 2,
// D 64, N 4096, all keys: 4.1e11 operations, 0.66 ms at the 620 TFLOP/s of mma.sync, exponentials
// 0.30 ms, in part beside the products; 0.3 GB of memory, 0.1 ms.
#include "kernels/cuda/attention_bf16.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct QueryGradients {
  static constexpr int slabs = D <= 64 ? 2 : 1;  // of 16 rows a warp
  static constexpr int rows = 64 * slabs;

  /// dS sums of a tile: [2, rows, blocks of the tile].
  static size_t sums(int blocks) { return sizeof(float) * 2 * rows * static_cast<size_t>(blocks); }
  static size_t shared_bytes(const AttentionProblem& p, const PackedRows& pack, bool dbias) {
    return SharedTile<D>::bytes(2 * rows + 4 * key_tile) + sizeof(float) * rows +
           AttendedKeys::bytes(p, pack) + (dbias ? sums(blocks_of_tile(p.block)) : 0);
  }
};

/// o . dO of a row, by eight neighbouring lanes, in packs of n elements.
template <int n>
__device__ __forceinline__ float row_dot(const bf16* o, const bf16* dout, int head_dim) {
  float sum = 0;
  for (int d = static_cast<int>(threadIdx.x) % 8 * n; d < head_dim; d += 8 * n) {
    const auto a = *reinterpret_cast<const Pack<bf16, n>*>(o + d);
    const auto b = *reinterpret_cast<const Pack<bf16, n>*>(dout + d);
#pragma unroll
    for (int e = 0; e < n; ++e) sum += to_float(a.at[e]) * to_float(b.at[e]);
  }
  return sum;
}

/// A query's sums of dS on their way to dbias: blocks come in ascending order, some in several
/// tiles of keys.
struct BiasGradient {
  float* row;
  bool add;  // to those of the group's heads that were here before
  int block = -1;
  float sum = 0;

  __device__ void put(int c, float x) {
    if (c == block) {
      sum += x;
    } else {
      flush();
      block = c;
      sum = x;
    }
  }
  __device__ void flush() {
    if (block >= 0) row[block] = add ? row[block] + sum : sum;
  }
};

/// Leaves sum_of(row, block) of dS over each block that meets keys [key, key + 8 n) of a tile; adds
/// to what the tile's keys before have left of it.
template <int slabs, int n, class SumOf>
__device__ __forceinline__ void sum_blocks(const float (&ds)[slabs][n][4], int block, int tile,
                                           int key, SumOf sum_of) {
  const int before = tile * key_tile % block;  // keys of the tile's first block in earlier tiles
  for (int c = (before + key) / block; c * block < before + key + 8 * n; ++c) {
    const int begin = c * block - before;
#pragma unroll
    for (int row = 0; row < 2 * slabs; ++row) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) {
        const int x = key + static_cast<int>(threadIdx.x) % 4 * 2 + j / 2 * 8 + j % 2;
        sum += begin <= x && x < begin + block ? ds[row / 2][j / 2][row % 2 * 2 + j % 2] : 0;
      }
      sum = quad_sum(sum);
      if (threadIdx.x % 4 != 0) continue;
      float& to = sum_of(row_of<slabs>(row / 2, row % 2), c);
      to = key > 0 && begin < key ? to + sum : sum;
    }
  }
}

template <int D>
__global__ void __launch_bounds__(attention_threads, 2)
    query_gradients(const __grid_constant__ AttentionProblem p, const Rows<bf16> q,
                    const Rows<bf16> k, const Rows<bf16> v, const Rows<bf16> o,
                    const Rows<bf16> dout, const float* lse, float* delta, const Rows<bf16> dq,
                    float* dbias, int64_t dbias_blocks, bool add_dq, const PackedRows pack,
                    int head0, int blocks, float scale, bool wide) {
  constexpr int slabs = QueryGradients<D>::slabs, rows = QueryGradients<D>::rows;
  constexpr int together = 32;  // keys
  const QueryTile queries(p, pack, head0);
  const int head_dim = static_cast<int>(p.D), thread = static_cast<int>(threadIdx.x);

  char* shared = dynamic_shared();
  const SharedTile<D> q_tile{shared_address(shared)};
  const SharedTile<D> dout_tile{shared_address(shared + SharedTile<D>::bytes(rows))};
  shared += SharedTile<D>::bytes(2 * rows);
  const uint32_t kv_address = shared_address(shared);
  const auto k_tile = [&](int place) { return SharedTile<D>::nth(kv_address, 2 * place); };
  const auto v_tile = [&](int place) { return SharedTile<D>::nth(kv_address, 2 * place + 1); };
  shared += SharedTile<D>::bytes(4 * key_tile);
  auto* deltas = reinterpret_cast<float*>(shared);
  shared += sizeof(float) * rows;
  AttendedKeys attended(p, queries, blocks, shared);
  auto* sums = reinterpret_cast<float*>(attended.after());
  const auto sum_of = [&](int place, int row, int block) -> float& {
    return sums[(place * rows + row) * blocks + block];
  };

  const HeadRows k_rows(k, queries.b, queries.r), v_rows(v, queries.b, queries.r);
  const auto fetch = [&](int tile, int place) {
    copy_keys(k_tile(place), k_rows, tile, p, wide);
    copy_keys(v_tile(place), v_rows, tile, p, wide);
    attended.prepare(tile, place);
  };
  queries.copy<rows>(q, q_tile, head_dim, wide);
  queries.copy<rows>(dout, dout_tile, head_dim, wide);
  const HeadRows o_rows = queries.heads(o), dout_rows = queries.heads(dout);
  for (int row = thread / 8; row < rows; row += attention_threads / 8) {
    float sum = 0;
    if (queries.has(row)) {
      const bf16 *a = queries.at(o_rows, row), *b = queries.at(dout_rows, row);
      sum = wide ? row_dot<8>(a, b, head_dim) : row_dot<2>(a, b, head_dim);
    }
    sum = quad_sum(sum);
    sum += __shfl_xor_sync(0xffffffffu, sum, 4);
    if (thread % 8 != 0) continue;
    deltas[row] = sum;
    if (queries.has(row)) delta[queries.index(p, row)] = sum;
  }
  BiasGradient gradient{};
  if (dbias) {
    float* first = dbias + queries.index(p) * dbias_blocks;
    gradient.row = first + thread * dbias_blocks;
    gradient.add = head0 > 0;
    for (int64_t x = thread; head0 == 0 && x < queries.count * dbias_blocks;
         x += attention_threads) {
      first[x] = 0;
    }
  }
  // Adds up what the heads of the thread's query have left of a tile.
  const auto collect = [&](int tile, int place) {
    if (attended.of(place, thread) == 0) return;
    const int block = attended.block(), c0 = tile * key_tile / block;
    const int end = min((tile + 1) * key_tile, static_cast<int>(p.keys));
    const int heads = min(pack.heads, queries.g - head0);
    for (int c = c0; c * block < end; ++c) {
      float sum = 0;
      for (int h = 0; h < heads; ++h) sum += sum_of(place, thread * pack.heads + h, c - c0);
      gradient.put(c, sum);
    }
  };

  __syncthreads();  // what the queries attend together
  int tile = attended.from(attended.first()), last = -1;
  if (tile < attended.end()) fetch(tile, 0);
  wait_copies();
  __syncthreads();

  const LeftOperand<D, slabs> q_operand(q_tile, threadIdx.x / 32 * 16 * slabs);
  const LeftOperand<D, slabs> dout_operand(dout_tile, threadIdx.x / 32 * 16 * slabs);
  float acc[slabs][D / 8][4] = {}, log_sum[slabs][2], mine_delta[slabs][2];
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of<slabs>(m, i);
      log_sum[m][i] = queries.has(row) ? lse[queries.index(p, row)] * log2_e : 0;
      mine_delta[m][i] = deltas[row];
    }
  }

  int place = 0;
  for (; tile < attended.end(); place ^= 1) {
    wait_copies();
    __syncthreads();  // this tile is here, and nobody uses the other place any more
    if (dbias && last >= 0) collect(last, place ^ 1);
    last = tile;
    tile = attended.from(last + 1);
    if (tile < attended.end()) fetch(tile, place ^ 1);
    const AttendingRows<slabs> mine(attended, pack, place);
    if (!mine.any()) continue;

    float of_tile[slabs][2] = {};  // sums of dS
#pragma unroll 1
    for (int key = 0; key < key_tile; key += together) {
      float s[slabs][together / 8][4] = {}, dp[slabs][together / 8][4] = {};
      rows_by_rows(s, q_operand, k_tile(place), key);
      rows_by_rows(dp, dout_operand, v_tile(place), key);
      mine.mask(s, last, key, log2_e / scale);
      float shift[slabs][2];
      mine.load_biases(shift);
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          shift[m][i] = mine.off(m, i) ? -INFINITY : shift[m][i] - log_sum[m][i];
#pragma unroll
          for (int j = 0; j < together / 8; ++j) {
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) {
              const float weight = power_of_2(fmaf(s[m][j][e], scale, shift[m][i]));
              s[m][j][e] = weight * (dp[m][j][e] - mine_delta[m][i]);
              of_tile[m][i] += s[m][j][e];
            }
          }
        }
      }
      weighted_rows(acc, s, k_tile(place), key);
      if (dbias && blocks > 1) {
        sum_blocks(s, attended.block(), last, key,
                   [&](int row, int c) -> float& { return sum_of(place, row, c); });
      }
    }
    if (!dbias || blocks > 1) continue;
#pragma unroll
    for (int m = 0; m < slabs; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(of_tile[m][i]);
        if (thread % 4 == 0) sum_of(place, row_of<slabs>(m, i), 0) = sum;
      }
    }
  }
  if (dbias && last >= 0) {
    __syncthreads();
    collect(last, place ^ 1);
    gradient.flush();
  }

  float factor[slabs][2];
#pragma unroll
  for (int m = 0; m < slabs; ++m) factor[m][0] = factor[m][1] = scale / log2_e;
  store_rows(acc, factor, queries, dq, head_dim, add_dq);
}

template <int D>
void backward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
              const Rows<bf16>& v, const Rows<bf16>& o, const Rows<bf16>& dout, const float* lse,
              float* delta, const AttentionGrads<bf16>& grads) {
  const PackedRows pack(p.g, QueryGradients<D>::rows);
  const bool wide = wide_rows(p, {q, k, v, o, dout, grads.dq});
  for (int head0 = 0; head0 < p.g; head0 += pack.heads) {
    launch("attention_backward: dq", query_gradients<D>, QueryTile::tiles(p, pack),
           attention_threads, QueryGradients<D>::shared_bytes(p, pack, grads.dbias), p, q, k, v, o,
           dout, lse, delta, grads.dq, grads.dbias, p.blocks(), grads.add_dq, pack, head0,
           blocks_of_tile(p.block), p.scale() * log2_e, wide);
  }
}

}  // namespace

void attention_backward(const AttentionProblem& problem, Rows<bf16> q, Rows<bf16> k, Rows<bf16> v,
                        Rows<bf16> o, Rows<bf16> dout, const float* lse, float* delta,
                        const AttentionGrads<bf16>& grads) {
  const AttentionProblem p = check_sizes(problem);
  by_head_dim(p.D, [&](auto D) { backward<D>(p, q, k, v, o, dout, lse, delta, grads); });
  attention_key_gradients(p, q, k, v, dout, lse, delta, grads.dk, grads.dv);
}

}  // namespace entrain::cuda
