// Dense causal attention in bf16 on Hopper, backward, first half: dq = dS K / sqrt(D).
//
// An item is 192 queries of a head (128 where D = 128), 64 a warpgroup; it goes through the keys up
// to its last query, 64 a step. Items are counted from the last query back, so that the one with
// fewer rows is the shortest. dS has its own query's rows, and as accumulators, rounded, is the
// left operand of dS K: nothing but K and V passes through shared memory.
//
// While a warpgroup computes P of a step, its dP runs; else the others keep the tensor cores busy.
// Floor: 6 D operations for each pair, B 16, Hq 8, Hkv 2, D 64, N 4096: 4.1e11, 0.46 ms at
// 900 TFLOP/s.
#include "kernels/cuda/attention_hopper.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct QueryGradients {
  static constexpr int groups = D == 64 ? 3 : 2, threads = (groups + 1) * warpgroup;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int stages = D == 64 ? 8 : 4;
  static constexpr int own_bytes = 2 * groups * block_bytes, stage_bytes = 2 * block_bytes;
  static constexpr int barriers_at = own_bytes + stages * stage_bytes;
  static constexpr int shared_bytes = 1024 + barriers_at + 8 * (2 * stages + 2);
};

template <int D>
__global__ void __launch_bounds__(QueryGradients<D>::threads, 1)
    query_gradients(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ DenseBackward p, const Rows<bf16> dq) {
#ifdef ENTRAIN_HOPPER
  using Shape = QueryGradients<D>;
  constexpr int groups = Shape::groups, stages = Shape::stages;
  const auto thread = static_cast<int>(threadIdx.x);
  const uint32_t shared = (shared_address(dynamic_shared()) + 1023) / 1024 * 1024;
  const auto q_block = [&](int i) { return Block{shared + 2 * i * Shape::block_bytes}; };
  const auto dout_block = [&](int i) { return Block{shared + (2 * i + 1) * Shape::block_bytes}; };
  const auto k_block = [&](int stage) { return q_block(groups + stage); };
  const auto v_block = [&](int stage) { return dout_block(groups + stage); };
  Ring<stages> ring{shared + Shape::barriers_at};
  Ring<1> own{ring.barriers + 8 * 2 * stages};
  if (thread == 0) {
    Ring<stages>::init(ring.barriers, 4 * groups);
    Ring<1>::init(own.barriers, 4 * groups);
    barrier_init_done();
  }
  __syncthreads();

  const int heads = p.B * p.Hq, items = heads * ((p.blocks + groups - 1) / groups);
  // The last queries see most keys. An item ends before block `end`; its first one may lie before
  // all queries.
  const auto end_of = [&](int item) { return p.blocks - item / heads * groups; };

  if (thread / warpgroup == groups) {
    fewer_registers<groups == 3 ? 32 : 24>();
    if (thread % warpgroup != 0) return;
    for_items(items, [&](int item) {
      const int b = item % heads / p.Hq, head = item % p.Hq, end = end_of(item);
      own.wait_empty();
      barrier_arrive_expecting(own.full(), Shape::own_bytes);
      for (int i = 0; i < groups; ++i) {
        const int row = (end - groups + i) * block_rows;
        copy_block<D>(q_block(i), q_map, own.full(), row, head, b);
        copy_block<D>(dout_block(i), dout_map, own.full(), row, head, b);
      }
      own.next();
      for (int t = 0; t < end; ++t) {
        ring.wait_empty();
        barrier_arrive_expecting(ring.full(), Shape::stage_bytes);
        copy_block<D>(k_block(ring.stage), k_map, ring.full(), t * block_rows, head / p.g, b);
        copy_block<D>(v_block(ring.stage), v_map, ring.full(), t * block_rows, head / p.g, b);
        ring.next();
      }
    });
    return;
  }

  more_registers<groups == 3 ? 160 : 240>();
  const int mine = uniform(thread / warpgroup);  // the warpgroup's block of an item
  const int lane_row = thread % warpgroup / 32 * 16 + thread % 32 / 4;
  const float scale = p.scale * log2_e;
  for_items(items, [&](int item) {
    const int b = item % heads / p.Hq, head = item % p.Hq, end = end_of(item);
    const int block = end - groups + mine, query = block * block_rows + lane_row;
    const int64_t row = p.row(b, head, max(query, 0));
    const float log_sum[2] = {p.numbers.log_sums[row], p.numbers.log_sums[row + 8]};
    const float delta[2] = {p.numbers.deltas[row], p.numbers.deltas[row + 8]};
    own.wait_full();
    constexpr bool in_registers = D > 64;
    const OwnBlock<D, in_registers> q(q_block(mine)), dout(dout_block(mine));
    if constexpr (in_registers) warp_arrive(own.empty(0));

    float ds[8][4], sum[D / 8][4] = {};
    pin(sum);
    int before = 0;
#pragma unroll 1
    for (int t = 0; t < end; ++t) {
      const int stage = uniform(ring.stage);
      ring.wait_full();
      add_query_gradients(
          sum, ds, q, dout, k_block(stage), v_block(stage), scale,
          [&](float(&shifts)[2]) {
            for (int i = 0; i < 2; ++i) shifts[i] = -log_sum[i];
          },
          delta,
          [&] {
            if (t > 0) warp_arrive(ring.empty(before));
          },
          [&](float(&weights)[8][4]) {
            if (t < block) return;
            // some keys come after some queries
            const int key = t * block_rows + thread % 4 * 2;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                if (key + 8 * j + e % 2 > query + e / 2 * 8) weights[j][e] = 0;
              }
            }
          });
      before = stage;
      ring.next();
    }
    products_wait<0>();
    pin(sum);
    warp_arrive(ring.empty(before));
    if constexpr (!in_registers) warp_arrive(own.empty(0));
    own.next();
    store_sums(sum, p.scale, dq, b, head, block * block_rows, p.N);
  });
#endif
}

}  // namespace

bool hopper_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors) {
  bool takes = (p.D == 64 || p.D == 128) && on_hopper();
  for (const Tensor& x : tensors) {
    const int64_t steps = x.stride[0] | x.stride[1] | x.stride[2];
    takes = takes && x.dtype == DType::bf16 && x.stride[3] == 1 && steps % 8 == 0 &&
            reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  }
  return takes;
}

bool hopper_attention_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors) {
  return p.dense() && p.keys == p.N && hopper_takes(p, tensors);
}

void hopper_attention_backward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                               const Rows<bf16>& v, const Rows<bf16>& o, const Rows<bf16>& dout,
                               const float* lse, float* scratch,
                               const AttentionGrads<bf16>& grads) {
  const int64_t blocks = ceil_div(p.N, block_rows);
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  const QueryNumbers numbers = query_numbers(p, o, dout, lse, scratch);
  const DenseBackward dense{whole(p.B), whole(p.Hq),   whole(p.Hkv), whole(p.g),
                            whole(p.N), whole(blocks), numbers,      p.scale()};
  const auto queries = [&](const Rows<bf16>& x) { return block_map(x, p.B, p.Hq, p.N, p.D); };
  const auto keys = [&](const Rows<bf16>& x) { return block_map(x, p.B, p.Hkv, p.N, p.D); };
  by_dense_head_dim(p.D, [&](auto D) {
    using Shape = QueryGradients<D>;
    const int64_t items = p.B * p.Hq * ceil_div(blocks, Shape::groups);
    launch("attention_backward: dq", query_gradients<D>,
           std::min<int64_t>(items, multiprocessors()), Shape::threads, Shape::shared_bytes,
           queries(q), keys(k), keys(v), queries(dout), dense, grads.dq);
  });
  hopper_key_gradients(p, dense, q, k, v, dout, grads.dk, grads.dv);
}

}  // namespace entrain::cuda
