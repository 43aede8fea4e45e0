// Block-sparse attention in bf16 on Hopper, forward: FlashAttention-2 (arXiv 2307.08691) over the
// tiles that queries attend, by warpgroup products and the copy engine (FlashAttention-3, arXiv
// 2407.08608).
//
// Items, steps and the ring of K and V are attention_sparse.cuh's. A warpgroup keeps the sums O of
// its 64 rows in registers, and q too where D is 128: there the keys are all that S = q K^T reads
// from shared memory, which else would be as busy as the tensor cores. The softmax is online, in
// powers of 2; P, rounded, is the left operand of O += P V, so it stays in registers as well.
//
// S of a step is started before P V of the step before, which runs while this step's exponentials
// are computed; the other warpgroups fill what gaps remain. One accumulator of scores and one
// rounded P suffice for that. D 128 takes two warpgroups of 232 registers: O, S, q and P are 144.
// D 64 takes three of 152 (O, S and P are 80), which share each copy of K and V: an exponential for
// each 4 D = 256 operations makes their units as busy as the tensor cores, and two warpgroups would
// leave both idle at times.
//
// Floor: 4 D operations for each attended (row, key). B 1, Hq 32, Hkv 2, D 128, N 16384, density
// 0.25: 5.5e11 operations, 0.56 ms at wgmma's 989 TFLOP/s, 0.9 ms at 600. A step copies 256 D bytes
// for an item's 64 rows a warpgroup: 32 KB for 128 rows in 1024 clocks where both attend the tile,
// about what the second-level cache gives.
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct Forward {
  static constexpr int groups = D == 64 ? 3 : 2, threads = (groups + 1) * warpgroup;
  static constexpr int stages = D == 64 ? 8 : 5;
  using Stages = SparseRing<D, groups, stages>;
  // q's blocks, the ring and the barriers of q; blocks at multiples of 1024.
  static constexpr int ring_at = groups * Stages::block_bytes, own_at = ring_at + Stages::bytes;
  static constexpr int shared_bytes = 1024 + own_at + 16;
};

#ifdef ENTRAIN_HOPPER

// Sums are scaled to the largest score so far, less a slack that saves most of the rescaling:
// weights stay below 2^8.
constexpr float slack = 8;

/// The online softmax of a thread's two rows. Each of the four lanes of a row has its own share of
/// the weights' sum.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, weight[2] = {};

  /// Scores become weights; `correction` is what sums of before are to be multiplied with. False:
  /// it is 1 for all rows of the warp. Weights of rows that are not `on` mean nothing.
  __device__ bool update(float (&s)[8][4], float (&correction)[2], const bool (&on)[2],
                         const float (&bias)[2], float scale) {
    float next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = -INFINITY;  // fmaxf passes over NaN; the exponentials below do not
#pragma unroll
      for (int j = 0; j < 8; ++j) x = fmaxf(x, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      next[i] = on[i] ? fmaxf(top[i], x * scale + bias[i]) : top[i];
    }
    const bool grows = next[0] > top[0] + slack || next[1] > top[1] + slack;
    const bool rescale = __any_sync(0xffffffffu, grows);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rescale) next[i] = top[i];
      const float shift = bias[i] - (next[i] == -INFINITY ? INFINITY : next[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          s[j][e] = power_of_2(fmaf(s[j][e], scale, shift));
          sum[i] += s[j][e];
        }
      }
    }
    // After the exponentials: ptxas would move a wait for products up to this branch.
    if (rescale) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        correction[i] = next[i] == top[i] ? 1 : power_of_2(top[i] - next[i]);
        top[i] = next[i];
        weight[i] *= correction[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) weight[i] += on[i] ? sum[i] : 0;
    return rescale;
  }
};

/// Weights, rounded, as a left operand: 0, whatever the weight, in rows that are not `on`.
__device__ __forceinline__ void round_weights(Fragment (&to)[4], const float (&s)[8][4],
                                              const bool (&on)[2]) {
  round_to(to, s);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[step][i] &= on[i % 2] ? ~0u : 0u;
  }
}

#endif  // ENTRAIN_HOPPER

template <int D>
__global__ void __launch_bounds__(Forward<D>::threads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map,
                   const __grid_constant__ AttentionProblem p, const PackedRows pack,
                   const Rows<bf16> o, float* lse, float scale) {
#ifdef ENTRAIN_HOPPER
  using Shape = Forward<D>;
  constexpr int groups = Shape::groups;
  const auto thread = static_cast<int>(threadIdx.x);
  char* shared = dynamic_shared();
  shared += -shared_address(shared) % 1024;
  const auto q_block = [&](int w) {
    return Block{shared_address(shared) + w * Shape::Stages::block_bytes};
  };
  typename Shape::Stages ring(shared + Shape::ring_at);
  Ring<1> own{shared_address(shared) + Shape::own_at};
  if (thread == 0) {
    ring.init(p);
    Ring<1>::init(own.barriers, 4 * groups);
    barrier_init_done();
  }
  // Rows of no query are never copied, but take part in products.
  for (int i = thread; i < Shape::ring_at / 16; i += Shape::threads) {
    reinterpret_cast<uint4*>(shared)[i] = {};
  }
  show_to_engines();
  __syncthreads();

  const int queries = groups * pack.queries;  // of an item
  const auto items = static_cast<int>(SparseItem::items(p, queries));

  if (thread / warpgroup == groups) {
    fewer_registers<groups == 3 ? 56 : 40>();
    if (thread % warpgroup >= 32) return;
    for_items(items, [&](int i) {
      const SparseItem item(p, queries, i);
      own.wait_empty();
      __syncwarp();
      if (thread % 32 == 0) {
        barrier_arrive_expecting(own.full(), groups * packed_bytes<D>(pack));
        for (int w = 0; w < groups; ++w) {
          copy_packed<D>(q_block(w), q_map, own.full(), p, item, item.first + w * pack.queries);
        }
      }
      own.next();
      ring.fill(p, queries, item, k_map, v_map);
    });
    return;
  }

  more_registers<groups == 3 ? 152 : 232>();
  const int mine = thread / warpgroup;
  for_items(items, [&](int i) {
    const SparseItem item(p, queries, i);
    const OwnRows rows(p, pack, item.first + mine * pack.queries);
    own.wait_full();
    constexpr bool in_registers = D > 64;
    const OwnBlock<D, in_registers> q(q_block(mine));
    if constexpr (in_registers) warp_arrive(own.empty(0));

    float s[8][4], sum[D / 8][4] = {};
    Fragment weights[4];
    OnlineSoftmax softmax;
    pin(sum);
    int before = -1;  // the stage whose P V is yet to be started
    // A step that is passed over, or the end, must not wait for it: the ring might need its stage.
    const auto finish = [&] {
      if (before < 0) return;
      products_fence();
      add_product(sum, weights, ring.v(before));
      products_commit();
      products_wait<0>();
      pin(sum);
      warp_arrive(ring.empty(before));
      before = -1;
    };
#pragma unroll 1
    while (true) {
      ring.wait_full();
      const int stage = ring.stage, tile = ring.step().tile;
      const uint64_t attending = ring.step().attending[mine];
      if (__any_sync(~0u, tile < 0)) break;
      if (!__any_sync(~0u, attending != 0)) {
        finish();
        warp_arrive(ring.empty(stage));
        ring.next();
        continue;
      }
      bool on[2];
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        on[i] = attending >> rows.query[i] & 1;
        if (p.bias) bias[i] = ring.step().bias[mine * pack.queries + rows.query[i]] * log2_e;
      }
      products_fence();
      q.by_rows(s, ring.k(stage));
      products_commit();
      if (before >= 0) {
        products_fence();
        add_product(sum, weights, ring.v(before));
        products_commit();
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      pin(s);
      rows.hide_unseen(s, tile);
      float correction[2];
      const bool rescale = softmax.update(s, correction, on, bias, scale);
      products_wait<0>();
      pin(sum);
      if (before >= 0) warp_arrive(ring.empty(before));
      if (rescale) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[j][e] *= correction[e / 2];
        }
      }
      round_weights(weights, s, on);
      before = stage;
      ring.next();
    }
    finish();
    warp_arrive(ring.empty(ring.stage));
    ring.next();
    if constexpr (!in_registers) warp_arrive(own.empty(0));
    own.next();

    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = quad_sum(softmax.weight[i]);
      inverse[i] = total > 0 ? 1 / total : total;  // an empty row gives 0; NaN stays NaN
      if (thread % 4 != 0 || !rows.has[i]) continue;
      // +infinity makes the backward pass of an empty row exp(-infinity) = 0.
      lse[rows.index(p, item, i)] =
          total == 0 ? INFINITY : softmax.top[i] * (1 / log2_e) + logf(total);
    }
    rows.store(sum, inverse, o, p, item, false);
  });
#endif
}

}  // namespace

bool sparse_attention_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors,
                            bool dbias) {
  const bool whole_tiles = (!p.mask && !p.bias && !dbias) || p.block % key_tile == 0;
  return hopper_takes(p, tensors) && whole_tiles && p.g <= block_rows && p.N >= block_rows &&
         p.keys > 0;
}

void sparse_attention_forward(const AttentionProblem& problem, const Rows<bf16>& q,
                              const Rows<bf16>& k, const Rows<bf16>& v, const Rows<bf16>& o,
                              float* lse) {
  const AttentionProblem p = check_sizes(problem);
  const PackedRows pack(p.g, block_rows);
  const CUtensorMap q_map = packed_map(q, p.B, p.Hq, p.N, p.D, pack.heads, pack.queries);
  const CUtensorMap k_map = block_map(k, p.B, p.Hkv, p.keys, p.D);
  const CUtensorMap v_map = block_map(v, p.B, p.Hkv, p.keys, p.D);
  by_dense_head_dim(p.D, [&](auto D) {
    using Shape = Forward<D>;
    const int64_t items = SparseItem::items(p, Shape::groups * pack.queries);
    launch("attention_forward, sparse", forward_kernel<D>,
           std::min<int64_t>(items, multiprocessors()), Shape::threads, Shape::shared_bytes, q_map,
           k_map, v_map, p, pack, o, lse, p.scale() * log2_e);
  });
}

}  // namespace entrain::cuda
