// Dense causal attention in bf16 on Hopper, backward, second half: dk = dS^T q / sqrt(D) and
// dv = P^T dO.
//
// An item is 128 keys of a kv head, 64 for each of two warpgroups; it goes through the g heads of
// its group and, of each, the queries from its first key on, 64 a step. S^T = K q^T and
// dP^T = V dO^T leave their rounded results where dv += P^T dO and dk += dS^T q want their left
// operands, so nothing but q and dO passes through shared memory, and every sum has one owner and
// one order.
//
// While a warpgroup computes P of a step, dk of the step before and dP of this one run; while it
// computes dS, dv of this step. Floor: 8 D operations for each pair, B 16, Hq 8, Hkv 2, D 64,
// N 4096: 5.5e11, 0.6 ms at 900 TFLOP/s. Measured on an H100: 1.11 ms; with delta and dq 1.76 ms,
// where cuDNN's deterministic backward takes 2.5 and its atomic one 1.9.
//
// At D 128 some words that only an item's begin and end need are spilled.
#include "kernels/cuda/attention_hopper.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct KeyGradients {
  static constexpr int groups = 2, threads = (groups + 1) * warpgroup;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int stages = D == 64 ? 6 : 4;
  static constexpr int row_bytes = 2 * block_rows * 4;  // of log sums and deltas
  static constexpr int own_bytes = 2 * groups * block_bytes;
  // Blocks come first, each at a multiple of 1024, then rows' numbers, then barriers.
  static constexpr int rows_at = own_bytes + stages * 2 * block_bytes;
  static constexpr int barriers_at = rows_at + stages * row_bytes;
  static constexpr int shared_bytes = 1024 + barriers_at + 8 * (2 * stages + 2);
};

template <int D>
__global__ void __launch_bounds__(KeyGradients<D>::threads, 1)
    key_gradients(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map,
                  const __grid_constant__ CUtensorMap dout_map,
                  const __grid_constant__ DenseBackward p, const Rows<bf16> dk,
                  const Rows<bf16> dv) {
#ifdef ENTRAIN_HOPPER
  using Shape = KeyGradients<D>;
  constexpr int groups = Shape::groups, stages = Shape::stages;
  const auto thread = static_cast<int>(threadIdx.x);
  const uint32_t shared = (shared_address(dynamic_shared()) + 1023) / 1024 * 1024;
  const auto k_block = [&](int i) { return Block{shared + 2 * i * Shape::block_bytes}; };
  const auto v_block = [&](int i) { return Block{shared + (2 * i + 1) * Shape::block_bytes}; };
  const auto q_block = [&](int stage) { return k_block(groups + stage); };
  const auto dout_block = [&](int stage) { return v_block(groups + stage); };
  const auto row_numbers = [&](int stage) {
    return shared + Shape::rows_at + stage * Shape::row_bytes;
  };
  Ring<stages> ring{shared + Shape::barriers_at};
  Ring<1> own{ring.barriers + 8 * 2 * stages};
  if (thread == 0) {
    Ring<stages>::init(ring.barriers, 4 * groups);
    Ring<1>::init(own.barriers, 4 * groups);
    barrier_init_done();
  }
  __syncthreads();

  const int key_heads = p.B * p.Hkv, tiles = (p.blocks + groups - 1) / groups;
  const int items = key_heads * tiles;
  // The first keys are seen by most queries.
  const auto block_of = [&](int item) { return item / key_heads * groups; };

  if (thread / warpgroup == groups) {
    fewer_registers<24>();
    if (thread % warpgroup != 0) return;
    for_items(items, [&](int item) {
      const int b = item % key_heads / p.Hkv, r = item % p.Hkv, block = block_of(item);
      own.wait_empty();
      barrier_arrive_expecting(own.full(), Shape::own_bytes);
      for (int i = 0; i < groups; ++i) {
        copy_block<D>(k_block(i), k_map, own.full(), (block + i) * block_rows, r, b);
        copy_block<D>(v_block(i), v_map, own.full(), (block + i) * block_rows, r, b);
      }
      own.next();
      for (int head = r * p.g; head < (r + 1) * p.g; ++head) {
        for (int t = block; t < p.blocks; ++t) {
          ring.wait_empty();
          barrier_arrive_expecting(ring.full(), 2 * Shape::block_bytes + Shape::row_bytes);
          copy_block<D>(q_block(ring.stage), q_map, ring.full(), t * block_rows, head, b);
          copy_block<D>(dout_block(ring.stage), dout_map, ring.full(), t * block_rows, head, b);
          const int64_t row = p.row(b, head, t * block_rows);
          const uint32_t numbers = row_numbers(ring.stage);
          copy_bytes(numbers, p.numbers.log_sums + row, Shape::row_bytes / 2, ring.full());
          copy_bytes(numbers + Shape::row_bytes / 2, p.numbers.deltas + row, Shape::row_bytes / 2,
                     ring.full());
          ring.next();
        }
      }
    });
    return;
  }

  more_registers<240>();
  const int mine = uniform(thread / warpgroup);  // the warpgroup's block of an item
  const float scale = p.scale * log2_e;
  for_items(items, [&](int item) {
    const int b = item % key_heads / p.Hkv, r = item % p.Hkv, block = block_of(item);
    const int steps = (p.blocks - block) * p.g;
    own.wait_full();
    const OwnBlock<D, false> k(k_block(mine)), v(v_block(mine));

    float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
    pin(dk_sum);
    pin(dv_sum);
    int before = 0, t = block;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = uniform(ring.stage);
      ring.wait_full();
      const uint32_t numbers = row_numbers(stage) + thread % 4 * 8;
      add_key_gradients<D>(
          dk_sum, dv_sum, k, v, q_block(stage), dout_block(stage), scale,
          [&](int j) { return load_pair(numbers + 32 * j); }, numbers + Shape::row_bytes / 2,
          [&] {
            if (step > 0) warp_arrive(ring.empty(before));
          },
          [&](float(&weights)[8][4]) {
            if (t > block + mine) return;
            // some queries come before some keys
            const int query = t * block_rows + thread % 4 * 2;
            const int key =
                (block + mine) * block_rows + thread % warpgroup / 32 * 16 + thread % 32 / 4;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                if (query + 8 * j + e % 2 < key + e / 2 * 8) weights[j][e] = 0;
              }
            }
          },
          [] {});
      before = stage;
      ring.next();
      if (++t == p.blocks) t = block;
    }
    products_wait<0>();
    pin(dk_sum);
    pin(dv_sum);
    warp_arrive(ring.empty(before));
    warp_arrive(own.empty(0));
    own.next();
    const int first = (block + mine) * block_rows;
    store_sums(dk_sum, p.scale, dk, b, r, first, p.N);
    store_sums(dv_sum, 1, dv, b, r, first, p.N);
  });
#endif
}

}  // namespace

void hopper_key_gradients(const AttentionProblem& p, const DenseBackward& dense,
                          const Rows<bf16>& q, const Rows<bf16>& k, const Rows<bf16>& v,
                          const Rows<bf16>& dout, const Rows<bf16>& dk, const Rows<bf16>& dv) {
  const auto queries = [&](const Rows<bf16>& x) { return block_map(x, p.B, p.Hq, p.N, p.D); };
  const auto keys = [&](const Rows<bf16>& x) { return block_map(x, p.B, p.Hkv, p.N, p.D); };
  by_dense_head_dim(p.D, [&](auto D) {
    using Shape = KeyGradients<D>;
    const int64_t items = p.B * p.Hkv * ceil_div(dense.blocks, Shape::groups);
    launch("attention_backward: dk and dv", key_gradients<D>,
           std::min<int64_t>(items, multiprocessors()), Shape::threads, Shape::shared_bytes,
           queries(q), keys(k), keys(v), queries(dout), dense, dk, dv);
  });
}

}  // namespace entrain::cuda
