// Block-sparse attention in bf16 on Hopper, forward: FlashAttention-2 (arXiv 2307.08691) over the
// tiles that queries attend, by warpgroup products and the copy engine (FlashAttention-3, arXiv
// 2407.08608).
//
// Items, steps and the ring of K and V are attention_sparse.cuh's. A warpgroup keeps the sums O of
// its 64 rows in registers; S = q K^T reads q from shared memory. The softmax is online, in powers
// of 2; P, rounded, is the left operand of O += P V, so it stays in registers as well.
//
// S of a step is started before P V of the step before, which runs while this step's exponentials
// are computed, also where tiles that the warpgroup passes over lie between the two. One
// accumulator of scores and one rounded P suffice for that. Yet from S through the softmax to P V a
// step takes several times as long as its products, so three warpgroups take turns at the tensor
// cores: 144 registers each hold O, S and P, 112 where D is 128, but not q. Two of 232 registers
// that held q took 1.17 ms for the shape below at density 0.125: 2570 clocks for each step of
// either, whose products are 512. Three take 3.4 instead of 4.4 ms where all tiles are attended,
// but 1.15 at that density, where they have fewer tiles in common and a quarter of the time no
// item; with items dealt out as multiprocessors come free, 0.90. With items drawn, so that one
// starts while another ends, 0.78 was expected and 0.80 measured. Four warpgroups, for D 64, would
// have 112 registers, which are too few.
//
// Four warps copy: one for each warpgroup its q, as soon as it has seen the last of its item
// before, and one the keys.
//
// Floor: 4 D operations for each attended (row, key). B 1, Hq 32, Hkv 2, D 128, N 16384, density
// 0.25: 5.5e11 operations, 0.56 ms at wgmma's 989 TFLOP/s, 0.9 ms at 600. A step of a tile that all
// three attend takes 1536 clocks of the tensor cores where D is 128, 1408 of shared memory (S reads
// 32 KB, P V 16 KB, and 32 KB are copied) and 768 of the exponentials' units. Where D is 64, the
// first two are half of that.
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct Forward {
  static constexpr int groups = 3, threads = (groups + 1) * warpgroup;
  static constexpr int stages = D == 64 ? 11 : 5;
  using Stages = SparseRing<D, groups, stages>;
  using Items = DrawnItems<groups>;
  // q's blocks, the ring, the barriers of q and items; blocks at multiples of 1024.
  static constexpr int ring_at = groups * Stages::block_bytes, own_at = ring_at + Stages::bytes;
  static constexpr int items_at = own_at + groups * 8 * 2;
  static constexpr int shared_bytes = 1024 + items_at + Items::bytes;
};

[[maybe_unused]] __device__ unsigned drawn;  // items, by the blocks of a launch; 0 between launches

#ifdef ENTRAIN_HOPPER

// Sums are scaled to the largest score so far, less a slack that saves most of the rescaling:
// weights stay below 2^8.
constexpr float slack = 8;

/// Weights of rows that are not `on`, and their sums, become 0.
__device__ __forceinline__ void hide_rows(float (&weights)[8][4], float (&sum)[2],
                                          const bool (&on)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!on[i]) sum[i] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) weights[j][e] = on[i] ? weights[j][e] : 0;
    }
  }
}

/// The online softmax of a thread's two rows. Each of the four lanes of a row has its own share of
/// the weights' sum.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, weight[2] = {};

  /// Scores become weights; those of rows that are not `on`, whose bias is -infinity, become 0,
  /// whatever they were. `correction` is what sums of before are to be multiplied with. False: it
  /// is 1 for all rows of the warp, and no lane has had to ask the others of its row.
  __device__ bool update(float (&s)[8][4], float (&correction)[2], const bool (&on)[2],
                         const float (&bias)[2], float scale) {
    float next[2];  // tops
    bool grows = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i] = fmaf(largest(s, i), scale, bias[i]);
      grows = grows || next[i] > top[i] + slack;
    }
    const bool rescale = __any_sync(0xffffffffu, grows);
    if (rescale) {
#pragma unroll
      for (int i = 0; i < 2; ++i) next[i] = fmaxf(top[i], quad_max(next[i]));
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) next[i] = top[i];
    }
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
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
    // Scores of rows that are off may be NaN or infinite.
    const bool odd = (!on[0] && sum[0] != 0) || (!on[1] && sum[1] != 0);
    if (__any_sync(0xffffffffu, odd)) hide_rows(s, sum, on);
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
    for (int i = 0; i < 2; ++i) weight[i] += sum[i];
    return rescale;
  }

 private:
  /// Of a thread's scores of row i, as a tree. fmaxf passes over NaN; the exponentials do not.
  __device__ static float largest(const float (&s)[8][4], int i) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = fmaxf(s[j][2 * i], s[j][2 * i + 1]);
#pragma unroll
    for (int n = 4; n > 0; n /= 2) {
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] = fmaxf(x[j], x[j + n]);
    }
    return x[0];
  }
};

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
  const int warp = __shfl_sync(~0u, thread / 32, 0);  // ptxas sees that lanes share it
  const uint32_t base =
      __shfl_sync(~0u, (shared_address(dynamic_shared()) + 1023) / 1024 * 1024, 0);
  auto* shared = static_cast<char*>(__cvta_shared_to_generic(base));
  const auto q_block = [&](int w) { return Block{base + w * Shape::Stages::block_bytes}; };
  typename Shape::Stages ring(shared + Shape::ring_at);
  // Of a warpgroup's q, which is filled anew while others still use theirs.
  const auto own_ring = [&](int w) { return Ring<1>{base + Shape::own_at + 16 * w}; };
  const int queries = groups * pack.queries;  // of an item
  typename Shape::Items items(shared + Shape::items_at,
                              static_cast<int>(SparseItem::items(p, queries)));
  if (thread == 0) {
    ring.init(p);
    items.init();
    for (int w = 0; w < groups; ++w) Ring<1>::init(own_ring(w).barriers, 4);
    barrier_init_done();
  }
  // Rows of no query are never copied, but take part in products.
  for (int i = thread; i < Shape::ring_at / 16; i += Shape::threads) {
    reinterpret_cast<uint4*>(shared)[i] = {};
  }
  show_to_engines();
  __syncthreads();

  if (warp >= 4 * groups) {
    fewer_registers<80>();
    const int copies = warp - 4 * groups;  // whose q, or all that comes through the ring
    if (copies == groups) {
      items.draw(&drawn, [&](int number) {
        ring.fill(p, queries, SparseItem(p, queries, number), k_map, v_map);
      });
      return;
    }
    Ring<1> own = own_ring(copies);
    const auto copy = [&](int number) {
      const SparseItem item(p, queries, number);
      const int first = item.first + copies * pack.queries;
      if (thread % 32 == 0) {
        prefetch_packed<D>(q_map, p, item, first);
        barrier_wait_asleep(own.empty(0), own.parity ^ 1);  // for most of an item
        barrier_arrive_expecting(own.full(), packed_bytes<D>(pack));
        copy_packed<D>(q_block(copies), q_map, own.full(), p, item, first);
      }
      own.next();
    };
    items.take(copy, true);
    return;
  }

  more_registers<144>();
  const int mine = warp / 4;
  Ring<1> own = own_ring(mine);
  const OwnBlock<D, false> q(q_block(mine));
  items.take([&](int number) {
    const SparseItem item(p, queries, number);
    const OwnRows rows(p, pack, item.first + mine * pack.queries);
    own.wait_full();

    float s[8][4], sum[D / 8][4] = {};
    Fragment weights[4];
    OnlineSoftmax softmax;
    pin(sum);
    int before = -1;  // the stage whose P V is yet to be started
    int passed = 0;   // tiles passed over since
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
    for (;; ring.next()) {
      ring.wait_full();
      const int stage = ring.stage, tile = ring.step().tile;
      const uint64_t attending = ring.step().attending[mine];
      if (attending == 0) {
        if (tile < 0) break;
        // While P V waits, so may the copies, for its stage: at most for half of the ring.
        if (++passed > Shape::stages / 2) finish();
        warp_arrive(ring.empty(stage));
        continue;
      }
      products_fence();
      q.by_rows(s, ring.k(stage));
      products_commit();
      bool on[2];
      float bias[2];
      const auto find_biases = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          on[i] = attending >> rows.query[i] & 1;
          const float of_block =
              p.bias ? ring.step().bias[mine * pack.queries + rows.query[i]] * log2_e : 0;
          bias[i] = on[i] ? of_block : -INFINITY;
        }
      };
      if (before >= 0) {
        products_fence();
        add_product(sum, weights, ring.v(before));
        products_commit();
        find_biases();  // while both run
        products_wait<1>();
      } else {
        find_biases();
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
      round_to(weights, s);
      before = stage;
      passed = 0;
    }
    warp_arrive(own.empty(0));
    own.next();
    finish();
    warp_arrive(ring.empty(ring.stage));  // that told of the end
    ring.next();

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
