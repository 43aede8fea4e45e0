// Attention in bf16, backward, second half: dk = dS^T q / sqrt(D) and dv = P^T dO.
//
// A block of 4 warps owns 64 keys of one kv head and goes through the queries that attend any of
// them, gathered from the masks 1024 at a time: a step takes 64 rows, the g heads of 64 / g such
// queries, wherever they lie, so that a mask saves what it leaves out, query by query. A warp
// computes S^T = K q^T and dP^T = V dO^T for its 16 keys and 32 rows at once: its sums are the left
// operands of the products that follow, dv += P^T dO and dk += dS^T q, which need no exchange
// between warps. dk and dv stay in registers, as do K and V where D <= 64; q and dO pass through
// shared memory, copied while the rows before are in use. For D > 128, 128 columns of dk and dv are
// computed at a time. Each sum has one owner and one order: no atomics.
//
// Floor: 8 D operations and an exponential for each (row, key) attended. B 16, Hq 8, Hkv 2, D 64,
// N 4096, all keys: 5.5e11 operations, 0.89 ms at the 620 TFLOP/s of mma.sync, exponentials
// 0.30 ms, in part beside the products. Shared memory sets the pace: 4 reads of a step's q or dO by
// each of 4 warps, 1.2 ms at 128 bytes a clock and multiprocessor.
#include "kernels/cuda/attending_queries.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct KeyGradients {
  static constexpr int columns = D < 128 ? D : 128;  // of dk and dv at a time

  static size_t shared_bytes(const AttentionProblem& p) {
    const auto blocks = static_cast<size_t>(p.bias ? blocks_of_tile(p.block) : 0);
    return SharedTile<D>::bytes(2 * key_tile + 4 * step_rows) +
           2 * step_rows * (sizeof(uint64_t) + sizeof(float) * (2 + blocks)) +
           sizeof(int) * AttendingQueries::ints;
  }
};

template <int D>
__global__ void __launch_bounds__(attention_threads, D <= 64 ? 3 : 2)
    key_gradients(const __grid_constant__ AttentionProblem p, const Rows<bf16> q,
                  const Rows<bf16> k, const Rows<bf16> v, const Rows<bf16> dout, const float* lse,
                  const float* delta, const Rows<bf16> dk, const Rows<bf16> dv,
                  const PackedRows pack, int blocks, float scale, bool wide) {
  constexpr int together = 32;  // rows
  constexpr int columns = KeyGradients<D>::columns, parts = D / columns;
  const int head_dim = static_cast<int>(p.D), thread = static_cast<int>(threadIdx.x);
  const int g = static_cast<int>(p.g), keys = static_cast<int>(p.keys);
  const int block = static_cast<int>(p.block);

  // The first keys are seen by most queries: they start first.
  const int groups = static_cast<int>(p.B * p.Hkv), group = static_cast<int>(blockIdx.x) % groups;
  const int b = group / static_cast<int>(p.Hkv), r = group % static_cast<int>(p.Hkv);
  const int tile = static_cast<int>(blockIdx.x) / groups / parts;
  const int part = static_cast<int>(blockIdx.x) / groups % parts;

  char* shared = dynamic_shared();
  const SharedTile<D> k_tile{shared_address(shared)};
  const SharedTile<D> v_tile{shared_address(shared + SharedTile<D>::bytes(key_tile))};
  shared += SharedTile<D>::bytes(2 * key_tile);
  const uint32_t rows_address = shared_address(shared);
  const auto q_tile = [&](int place) { return SharedTile<D>::nth(rows_address, 2 * place); };
  const auto dout_tile = [&](int place) { return SharedTile<D>::nth(rows_address, 2 * place + 1); };
  shared += SharedTile<D>::bytes(4 * step_rows);
  auto* attended = reinterpret_cast<uint64_t*>(shared);  // [2, queries]: the keys, a bit each
  auto* log_sums = reinterpret_cast<float*>(attended + 2 * step_rows);  // [2, rows]
  auto* deltas = log_sums + 2 * step_rows;                              // [2, rows]
  auto* list = reinterpret_cast<int*>(deltas + 2 * step_rows);
  auto* biases = reinterpret_cast<float*>(list + AttendingQueries::ints);  // [2, rows, blocks]
  AttendingQueries queries(p, group, tile, 0, static_cast<int>(p.N), list);

  copy_keys(k_tile, HeadRows(k, b, r), tile, p, wide);
  copy_keys(v_tile, HeadRows(v, b, r), tile, p, wide);
  wait_copies();
  __syncthreads();
  const int warp_key = thread / 32 * 16;
  const LeftOperand<D, 1> k_operand(k_tile, warp_key), v_operand(v_tile, warp_key);

  // Step n of the list: some queries, and some of their heads where a group is larger than a step.
  const int head_steps = (g + pack.heads - 1) / pack.heads;
  struct Step {
    int first, count, head0;
  };
  const auto step_of = [&](int n) {
    const int first = n / head_steps * pack.queries;
    return Step{first, min(pack.queries, queries.count() - first), n % head_steps * pack.heads};
  };
  const HeadRows q_rows(q, b, r * g), dout_rows(dout, b, r * g);
  const auto fetch = [&](int n, int place) {
    const Step step = step_of(n);
    const auto has = [&](int row) {
      return pack.query(row) < step.count && step.head0 + pack.head(row) < g;
    };
    const auto query = [&](int row) {
      return queries[step.first + min(pack.query(row), step.count - 1)];
    };
    for_chunks<step_rows, D>(wide, [&](int row, int d, auto w) {
      const int i = query(row), head = step.head0 + pack.head(row);
      copy_chunk<w>(q_tile(place), row, d, q_rows.at(head, i), has(row), head_dim);
      copy_chunk<w>(dout_tile(place), row, d, dout_rows.at(head, i), has(row), head_dim);
    });
    if (thread >= step_rows) return;
    const int row = thread, at = place * step_rows + row;
    const int64_t index = (b * p.Hq + r * g + step.head0 + pack.head(row)) * p.N + query(row);
    copy_async<4>(shared_address(log_sums + at), lse + index, has(row));
    copy_async<4>(shared_address(deltas + at), delta + index, has(row));
    if (p.bias) {
      const int c0 = tile * key_tile / block;
      const float* from = p.bias + (group * p.N + query(row)) * p.bias_blocks + c0;
      for (int c = 0; c < blocks; ++c) {
        copy_async<4>(shared_address(biases + at * blocks + c), from + c,
                      has(row) && (c0 + c) * block < keys);
      }
    }
    if (queries.whole(step.first, step.count)) return;
    uint64_t attends = 0;  // by query number `row` of this step
    if (row < step.count) {
      const int i = queries[step.first + row];
      attends = attended_keys(p, queries.word(i), seen_by(p, i), tile);
    }
    attended[at] = attends;
  };

  // The thread's two keys of the tile, and which of its blocks they lie in.
  const int key[2] = {warp_key + thread % 32 / 4, warp_key + thread % 32 / 4 + 8};
  int block_of[2] = {0, 0};
  if (p.bias && blocks > 1) {
    for (int i = 0; i < 2; ++i) block_of[i] = (tile * key_tile % block + key[i]) / block;
  }

  float dk_sum[1][columns / 8][4] = {}, dv_sum[1][columns / 8][4] = {};
  const auto accumulate = [&](int n, int place) {
    const Step step = step_of(n);
    const bool whole = queries.whole(step.first, step.count);
#pragma unroll 1
    for (int row0 = 0; row0 < step_rows; row0 += together) {
      float s[1][together / 8][4] = {}, ds[1][together / 8][4] = {};
      rows_by_rows(s, k_operand, q_tile(place), row0);
      rows_by_rows(ds, v_operand, dout_tile(place), row0);
      const int mine = row0 + thread % 4 * 2;  // the thread's rows: mine + 8 j, and the next
      if (p.bias) {
#pragma unroll
        for (int j = 0; j < together / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = place * step_rows + mine + 8 * j + e % 2;
            s[0][j][e] += biases[row * blocks + block_of[e / 2]] * (log2_e / scale);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < together / 8; ++j) {
        const int at = place * step_rows + mine + 8 * j;
        const auto log_sum = *reinterpret_cast<const float2*>(log_sums + at);
        const float shift[2] = {-log_sum.x * log2_e, -log_sum.y * log2_e};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[0][j][e] = power_of_2(fmaf(s[0][j][e], scale, shift[e % 2]));
        }
      }
      if (!whole) {
#pragma unroll
        for (int j = 0; j < together / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint64_t bits = attended[place * step_rows + pack.query(mine + 8 * j + e)];
            if (!(bits >> key[0] & 1)) s[0][j][e] = 0;
            if (!(bits >> key[1] & 1)) s[0][j][2 + e] = 0;
          }
        }
      }
      weighted_rows(dv_sum, s, dout_tile(place), row0, part * columns / 16);
#pragma unroll
      for (int j = 0; j < together / 8; ++j) {
        const auto sums =
            *reinterpret_cast<const float2*>(deltas + place * step_rows + mine + 8 * j);
        const float mine_delta[2] = {sums.x, sums.y};
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[0][j][e] = s[0][j][e] * (ds[0][j][e] - mine_delta[e % 2]);
      }
      weighted_rows(dk_sum, ds, q_tile(place), row0, part * columns / 16);
    }
  };

  while (queries.more()) {
    queries.append();
    // Rows that do not fill a step wait for more.
    const int fill = queries.more() ? 0 : pack.queries - 1;
    const int batches = (queries.count() + fill) / pack.queries, steps = batches * head_steps;
    if (steps > 0) fetch(0, 0);
    for (int n = 0; n < steps; ++n) {
      wait_copies();
      __syncthreads();  // this step is here, and nobody uses the other place any more
      if (n + 1 < steps) fetch(n + 1, (n + 1) % 2);
      accumulate(n, n % 2);
    }
    __syncthreads();
    queries.drop(min(batches * pack.queries, queries.count()));
  }

  const auto store = [&](const float(&sum)[1][columns / 8][4], const Rows<bf16>& to, float factor) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = tile * key_tile + key[i];
      if (at >= keys) continue;
      bf16* row = to.at(b, r, at);
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        const int d = part * columns + 8 * j + thread % 4 * 2;
        if (d >= head_dim) break;
        *reinterpret_cast<__nv_bfloat162*>(row + d) =
            __floats2bfloat162_rn(sum[0][j][2 * i] * factor, sum[0][j][2 * i + 1] * factor);
      }
    }
  };
  store(dk_sum, dk, scale / log2_e);
  store(dv_sum, dv, 1);
}

template <int D>
void backward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
              const Rows<bf16>& v, const Rows<bf16>& dout, const float* lse, const float* delta,
              const Rows<bf16>& dk, const Rows<bf16>& dv) {
  const PackedRows pack(p.g, step_rows);
  const int64_t parts = D / KeyGradients<D>::columns;
  const bool wide = wide_rows(p, {q, k, v, dout, dk, dv});
  launch("attention_backward: dk and dv", key_gradients<D>,
         p.B * p.Hkv * parts * ceil_div(p.keys, key_tile), attention_threads,
         KeyGradients<D>::shared_bytes(p), p, q, k, v, dout, lse, delta, dk, dv, pack,
         blocks_of_tile(p.block), p.scale() * log2_e, wide);
}

}  // namespace

void attention_key_gradients(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                             const Rows<bf16>& v, const Rows<bf16>& dout, const float* lse,
                             const float* delta, const Rows<bf16>& dk, const Rows<bf16>& dv) {
  if (p.keys == 0) return;
  by_head_dim(p.D, [&](auto D) { backward<D>(p, q, k, v, dout, lse, delta, dk, dv); });
}

}  // namespace entrain::cuda
