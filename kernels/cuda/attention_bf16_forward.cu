// Attention in bf16, forward: FlashAttention-2 (arXiv 2307.08691) over the blocks that queries
// attend.
//
// A block of 4 warps owns 128 rows (64 where D > 128): the g heads of 128 / g queries of one kv
// head. A warp keeps the sums O of its 32 rows (16) in registers, with Q where D <= 64. Tiles of 64
// keys and values pass through shared memory, copied while the tile before is in use; tiles that no
// query attends are passed over, and a warp sits out those that none of its rows attends. The
// softmax is online, in powers of 2.
//
// Floor: 4 D operations and one exponential for each (row, key) of the tiles. B 16, Hq 8, Hkv 2,
// D 64, N 4096, all keys: 2.8e11 operations, 0.44 ms at the 620 TFLOP/s that mma.sync reaches on an
// H100 (0.28 ms at wgmma's 989), 1.1e9 exponentials, 0.30 ms at 16 a clock and multiprocessor, in
// part beside the products; 0.17 GB of memory, 0.06 ms. Of a mask, what counts is the tiles that
// any of 32 / g neighbouring queries attends.
#include "kernels/cuda/attention_bf16.cuh"

namespace entrain::cuda {
namespace {

// Sums are scaled to the largest score so far, less a slack that saves most of the rescaling:
// weights stay below 2^8.
constexpr float slack = 8;

template <int D>
struct Forward {
  static constexpr int slabs = D <= 128 ? 2 : 1;  // of 16 rows a warp
  static constexpr int rows = 64 * slabs;
  static constexpr int together = D <= 128 ? 64 : 32;  // keys whose scores are held at once

  static size_t shared_bytes(const AttentionProblem& p, const PackedRows& pack) {
    return SharedTile<D>::bytes(rows + 4 * key_tile) + AttendedKeys::bytes(p, pack);
  }
};

template <int D>
__global__ void __launch_bounds__(attention_threads, 2)
    forward_kernel(const __grid_constant__ AttentionProblem p, const Rows<bf16> q,
                   const Rows<bf16> k, const Rows<bf16> v, const Rows<bf16> o, float* lse,
                   const PackedRows pack, int head0, int blocks, float scale, bool wide) {
  constexpr int slabs = Forward<D>::slabs, rows = Forward<D>::rows;
  constexpr int together = Forward<D>::together;
  const QueryTile queries(p, pack, head0);
  const int head_dim = static_cast<int>(p.D);

  char* shared = dynamic_shared();
  const SharedTile<D> q_tile{shared_address(shared)};
  shared += SharedTile<D>::bytes(rows);
  const uint32_t kv_address = shared_address(shared);
  const auto k_tile = [&](int place) { return SharedTile<D>::nth(kv_address, 2 * place); };
  const auto v_tile = [&](int place) { return SharedTile<D>::nth(kv_address, 2 * place + 1); };
  AttendedKeys attended(p, queries, blocks, shared + SharedTile<D>::bytes(4 * key_tile));

  const HeadRows k_rows(k, queries.b, queries.r), v_rows(v, queries.b, queries.r);
  const auto fetch = [&](int tile, int place) {
    copy_keys(k_tile(place), k_rows, tile, p, wide);
    copy_keys(v_tile(place), v_rows, tile, p, wide);
    attended.prepare(tile, place);
  };

  queries.copy<rows>(q, q_tile, head_dim, wide);
  __syncthreads();  // what the queries attend together
  int tile = attended.from(attended.first());
  if (tile < attended.end()) fetch(tile, 0);
  wait_copies();
  __syncthreads();

  const LeftOperand<D, slabs> q_operand(q_tile, threadIdx.x / 32 * 16 * slabs);
  float sums[slabs][D / 8][4] = {}, top[slabs][2], weight[slabs][2] = {};
#pragma unroll
  for (int m = 0; m < slabs; ++m) top[m][0] = top[m][1] = -INFINITY;

  for (int place = 0; tile < attended.end(); place ^= 1) {
    wait_copies();
    __syncthreads();  // this tile is here, and nobody uses the other place any more
    const int now = tile;
    tile = attended.from(now + 1);
    if (tile < attended.end()) fetch(tile, place ^ 1);
    const AttendingRows<slabs> mine(attended, pack, place);
    if (!mine.any()) continue;

#pragma unroll 1
    for (int key = 0; key < key_tile; key += together) {
      float s[slabs][together / 8][4] = {};
      rows_by_rows(s, q_operand, k_tile(place), key);
      mine.mask(s, now, key, log2_e / scale);

      float bias[slabs][2], most[slabs][2];
      mine.load_biases(bias);
      bool grows = false;
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float x = -INFINITY;  // fmaxf passes over NaN; the exponentials below do not
#pragma unroll
          for (int j = 0; j < together / 8; ++j) {
            x = fmaxf(x, fmaxf(s[m][j][2 * i], s[m][j][2 * i + 1]));
          }
          x = quad_max(x);  // by all lanes: rows differ in whether they are off
          most[m][i] = mine.off(m, i) ? -INFINITY : x * scale + bias[m][i];
          grows = grows || most[m][i] > top[m][i] + slack;
        }
      }
      if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
        for (int m = 0; m < slabs; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float next = fmaxf(top[m][i], most[m][i]);
            const float correction = next == top[m][i] ? 1 : power_of_2(top[m][i] - next);
            top[m][i] = next;
            weight[m][i] *= correction;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
              sums[m][j][2 * i] *= correction;
              sums[m][j][2 * i + 1] *= correction;
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < slabs; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool nothing = mine.off(m, i) || top[m][i] == -INFINITY;
          const float shift = nothing ? -INFINITY : bias[m][i] - top[m][i];
#pragma unroll
          for (int j = 0; j < together / 8; ++j) {
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) {
              s[m][j][e] = power_of_2(fmaf(s[m][j][e], scale, shift));
              weight[m][i] += s[m][j][e];
            }
          }
        }
      }
      weighted_rows(sums, s, v_tile(place), key);
    }
  }

  float inverse[slabs][2];
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of<slabs>(m, i);
      const float sum = quad_sum(weight[m][i]);
      inverse[m][i] = sum > 0 ? 1 / sum : sum;  // an empty row gives 0; NaN stays NaN
      if (threadIdx.x % 4 != 0 || !queries.has(row)) continue;
      // +infinity makes the backward pass of an empty row exp(-infinity) = 0.
      lse[queries.index(p, row)] = sum == 0 ? INFINITY : top[m][i] * (1 / log2_e) + logf(sum);
    }
  }
  store_rows(sums, inverse, queries, o, head_dim, false);
}

template <int D>
void forward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
             const Rows<bf16>& v, const Rows<bf16>& o, float* lse) {
  const PackedRows pack(p.g, Forward<D>::rows);
  const bool wide = wide_rows(p, {q, k, v, o});
  for (int head0 = 0; head0 < p.g; head0 += pack.heads) {
    launch("attention_forward", forward_kernel<D>, QueryTile::tiles(p, pack), attention_threads,
           Forward<D>::shared_bytes(p, pack), p, q, k, v, o, lse, pack, head0,
           blocks_of_tile(p.block), p.scale() * log2_e, wide);
  }
}

}  // namespace

void attention_forward(const AttentionProblem& problem, Rows<bf16> q, Rows<bf16> k, Rows<bf16> v,
                       Rows<bf16> o, float* lse) {
  const AttentionProblem p = check_sizes(problem);
  by_head_dim(p.D, [&](auto D) { forward<D>(p, q, k, v, o, lse); });
}

}  // namespace entrain::cuda
