// Block-sparse attention in bf16 on Hopper, backward, first half: dq = dS K / sqrt(D), and dbias,
// the sums of dS over a block's keys and a group's heads.
//
// Items, steps and the ring of K and V are attention_sparse.cuh's; a warpgroup has 64 rows, and a
// thread block three of them where D is 64, two where D is 128. dS is the left operand of
// dq += dS K where S and dP leave it, and nothing but K and V passes through shared memory. For
// dbias a lane sums what it has of dS, and while the next step's products run, these sums are added
// up over a query's rows by shuffles where they are in one warp (g 1, 2, 4, 8 and 16), else at once
// through shared memory. One lane writes a query's sums, those of a block of several tiles in the
// tiles' order.
//
// Exponentials run beside dP. Where D is 128 there are registers for P beside S, so S of the next
// tile that the warpgroup attends, where the ring has it, is started before dS of this one: the
// tensor cores have it to do while dS is computed, and then dS K. So a warpgroup by itself would
// keep them busy for 770 of about 900 clocks a step, instead of 1050. dP starts when S and dS K
// have ended: where one round of the loop starts a product and the next one reads its result while
// others still run, ptxas has each waited for at once.
//
// The last product of a step runs on while a warpgroup passes over tiles and goes into its next
// step. But before it waits for the ring, it waits for that product and frees its stage, which the
// ring may need.
//
// One warp copies the keys, and one for each warpgroup its q and dO, as soon as it has done with
// those of its item before, while other warpgroups may still be at theirs. q is held in registers
// where D is 128; dO and, where D is 64, q are read from shared memory, since sums, scores and
// rounded dS leave no more registers. What warps know of an item is spilled in part: the copying
// ones read a few words back in a step, the others one at most.
//
// Floor: 6 D operations for each attended (row, key). B 1, Hq 32, Hkv 2, D 128, N 16384, density
// 0.125: 4.1e11 operations, 0.42 ms at wgmma's 989 TFLOP/s, 0.69 ms at 600. A step copies 256 D
// bytes: 32 KB, 1370 clocks at the second-level cache's 24 bytes each, beside products of 1540
// clocks where both warpgroups attend the tile and of 770 where one does. An H100 took 1.48 ms,
// 3900 clocks for a warpgroup's step, when sums for dbias, biases and descriptors computed lane by
// lane came between the products. Without these 1 ms was expected and 1.45 measured; with items
// dealt out as multiprocessors come free, 1.3. Of drawn items and S started ahead 1.05 was
// expected; 1.11 was measured.
#include "kernels/cuda/attention_sparse.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct QueryGradients {
  static constexpr int groups = D == 64 ? 3 : 2, threads = (groups + 1) * warpgroup;
  static constexpr int stages = D == 64 ? 8 : 4;
  using Ring = SparseRing<D, groups, stages>;
  using Items = DrawnItems<groups>;

  // Own blocks come first, then the ring, its sums of dS, barriers for each warpgroup's blocks and
  // items.
  static constexpr int own_bytes = 2 * groups * Ring::block_bytes;
  static constexpr int sums_at = own_bytes + Ring::bytes;
  static constexpr int sums_bytes = stages * groups * block_rows * 4;
  static constexpr int barriers_at = sums_at + sums_bytes;
  static constexpr int items_at = barriers_at + groups * 8 * 2;
  static constexpr int shared_bytes = 1024 + items_at + Items::bytes;
};

[[maybe_unused]] __device__ unsigned drawn;  // items, by the blocks of a launch; 0 between launches

#ifdef ENTRAIN_HOPPER

/// A warpgroup's part of dbias. Sums of a tile are taken at its step; where all rows of a query are
/// in one warp, they are added up and written when the next step's products run.
class BiasGradients {
 public:
  /// dbias: of the first query, or null. barrier: the warpgroup's.
  __device__ BiasGradients(float* dbias, int64_t blocks, int block, const PackedRows& pack,
                           int barrier)
      : block_(block), heads_(pack.heads), barrier_(barrier), in_warp_(16 % pack.heads == 0) {
    const int thread = static_cast<int>(threadIdx.x) % warpgroup, lane = thread % 32;
    // Lanes that differ in these bits only have rows of the same query.
    lanes_ = (4 * min(heads_, 8) - 2) | (heads_ == 16 ? 1 : 0);
    const int row = thread / 32 * 16 + lane % 2 * 8 + lane / 4;
    const bool writes = in_warp_ ? (lane & lanes_) == 0 : thread < pack.queries;
    query_ = !writes ? -1 : in_warp_ ? pack.query(row) : thread;
    row_ = dbias + max(query_, 0) * blocks;
  }
  /// attending: the queries of the warpgroup that attend the tile. room: for a float for each row.
  __device__ void take(const float (&ds)[8][4], int tile, uint64_t attending, float* room) {
    float sums[2];  // of the thread's part of its rows
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        even += ds[j][2 * i];
        odd += ds[j][2 * i + 1];
      }
      sums[i] = even + odd;
    }
    tile_ = query_ >= 0 && attending >> query_ & 1 ? tile : -1;
    if (in_warp_) {
      // A lane goes on with one of the two.
      const bool second = threadIdx.x % 2 == 1;
      sum_ = (second ? sums[1] : sums[0]) +
             __shfl_xor_sync(0xffffffffu, second ? sums[0] : sums[1], 1);
    } else {
      add_up(sums, room);
    }
  }
  /// By whole warps; nothing where all has been written.
  __device__ void write() {
    if (in_warp_) {
#pragma unroll
      for (int offset : {2, 4, 8, 16, 1}) {
        const float other = __shfl_xor_sync(0xffffffffu, sum_, offset);
        if (lanes_ & offset) sum_ += other;
      }
    }
    if (tile_ < 0) return;
    const int block = block_ == key_tile ? tile_ : tile_ * key_tile / block_;
    of_block_ = block == before_ ? of_block_ + sum_ : sum_;
    before_ = block;
    row_[block] = of_block_;
    tile_ = -1;
  }

 private:
  /// A query's rows lie in several warps: one thread adds them up.
  __device__ void add_up(const float (&sums)[2], float* room) {
    const int thread = static_cast<int>(threadIdx.x) % warpgroup;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(sums[i]);
      if (thread % 4 == 0) room[thread / 32 * 16 + i * 8 + thread % 32 / 4] = sum;
    }
    warpgroup_sync(barrier_);
    sum_ = 0;
    if (query_ < 0) return;
    for (int h = 0; h < heads_; ++h) sum_ += room[query_ * heads_ + h];
  }

  int block_, heads_, barrier_;
  bool in_warp_;
  int lanes_;
  int query_;  // whose sums the thread writes, or negative
  float* row_;
  int tile_ = -1;  // where that query's sum is to be written, or negative
  float sum_ = 0;
  int before_ = -1;  // a block may have several tiles, which come one after the other
  float of_block_ = 0;
};

#endif  // ENTRAIN_HOPPER

template <int D>
__global__ void __launch_bounds__(QueryGradients<D>::threads, 1)
    query_gradients(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ AttentionProblem p, const PackedRows pack,
                    const float2* numbers, float scale, const Rows<bf16> dq, bool add_dq,
                    float* dbias, int64_t dbias_blocks) {
#ifdef ENTRAIN_HOPPER
  using Shape = QueryGradients<D>;
  constexpr int groups = Shape::groups;
  constexpr bool scores_ahead = D > 64;  // there are registers for S of a step beside P of another
  const auto thread = static_cast<int>(threadIdx.x);
  char* shared = dynamic_shared();
  shared += -shared_address(shared) % 1024;
  const uint32_t own_blocks = shared_address(shared);
  const auto q_block = [&](int i) { return Block{own_blocks + 2 * i * Shape::Ring::block_bytes}; };
  const auto dout_block = [&](int i) {
    return Block{q_block(i).address + Shape::Ring::block_bytes};
  };
  typename Shape::Ring ring(shared + Shape::own_bytes);
  auto* sums = reinterpret_cast<float*>(shared + Shape::sums_at);
  // Of a warpgroup's own blocks, which are filled anew while others still use theirs.
  const auto own_ring = [&](int i) { return Ring<1>{own_blocks + Shape::barriers_at + 16 * i}; };
  const int queries = groups * pack.queries;
  typename Shape::Items items(shared + Shape::items_at,
                              static_cast<int>(SparseItem::items(p, queries)));
  if (thread == 0) {
    ring.init(p);
    items.init();
    for (int i = 0; i < groups; ++i) Ring<1>::init(own_ring(i).barriers, 4);
    barrier_init_done();
  }
  // Rows of no query are never copied, but take part in products.
  for (int x = thread * 16; x < Shape::own_bytes; x += Shape::threads * 16) {
    *reinterpret_cast<uint4*>(shared + x) = uint4{};
  }
  show_to_engines();
  __syncthreads();

  if (thread / warpgroup == groups) {
    fewer_registers<56>();
    const int warp = thread % warpgroup / 32;
    if (warp < groups) {
      Ring<1> own = own_ring(warp);
      const auto copy = [&](int number) {
        const SparseItem item(p, queries, number);
        const int first = item.first + warp * pack.queries;
        if (thread % 32 == 0) {
          prefetch_packed<D>(q_map, p, item, first);
          prefetch_packed<D>(dout_map, p, item, first);
          barrier_wait_asleep(own.empty(0), own.parity ^ 1);  // for most of an item
          barrier_arrive_expecting(own.full(), 2 * packed_bytes<D>(pack));
          copy_packed<D>(q_block(warp), q_map, own.full(), p, item, first);
          copy_packed<D>(dout_block(warp), dout_map, own.full(), p, item, first);
        }
        own.next();
      };
      items.take(copy, true);
    }
    if (warp == 3) {
      items.draw(&drawn, [&](int number) {
        ring.fill(p, queries, SparseItem(p, queries, number), k_map, v_map);
      });
    }
    return;
  }

  more_registers<groups == 3 ? 152 : 224>();
  const int mine = uniform(thread / warpgroup);
  Ring<1> own = own_ring(mine);
  items.take([&](int number) {
    const SparseItem item(p, queries, number);
    const int first = mine * pack.queries;  // of the item
    const OwnRows rows(p, pack, item.first + first);
    float log_sum[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t query = item.index(p) + first + rows.query[i];
      const float2 pair =
          rows.has[i] ? numbers[query * p.g + rows.head[i]] : make_float2(INFINITY, 0);
      log_sum[i] = pair.x;
      delta[i] = pair.y;
    }
    BiasGradients gradients(dbias + (item.index(p) + first) * dbias_blocks, dbias_blocks,
                            static_cast<int>(p.block), pack, 1 + mine);
    own.wait_full();
    const OwnBlock<D, (D > 64)> q(q_block(mine));
    const OwnBlock<D, false> dout(dout_block(mine));

    bool more = false;  // whether the ring stands at a step to take
    // Passes over tiles that none of the warpgroup's queries attends. False: the next one is not
    // there yet, and was not to be waited for.
    const auto look = [&](bool wait) {
      for (;; ring.next()) {
        if (wait) {
          ring.wait_full();
        } else if (!ring.is_full()) {
          return false;
        }
        more = __any_sync(~0u, ring.step().attending[mine] != 0);
        if (more || __any_sync(~0u, ring.step().tile < 0)) return true;
        warp_arrive(ring.empty(ring.stage));
      }
    };
    float s[8][4], ds[8][4], sum[D / 8][4] = {};
    pin(sum);
    const auto start_scores = [&] {
      products_fence();
      q.by_rows(s, ring.k(uniform(ring.stage)));
      products_commit();
    };
    bool known = true, started = false;  // whether the next step is there, and its S runs
    look(true);
    int before = -1;  // the stage whose keys the last product may still read
#pragma unroll 1
    while (more) {
      const int stage = uniform(ring.stage);
      const SparseStep<groups>& step = ring.step();
      if (!started) start_scores();
      float shifts[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float bias = p.bias ? step.bias[first + rows.query[i]] * log2_e : 0;
        const bool attends = step.attending[mine] >> rows.query[i] & 1;
        shifts[i] = attends ? bias - log_sum[i] : -INFINITY;
      }
      if (dbias) gradients.write();
      products_wait<0>();
      pin(s);
      pin(sum);
      products_fence();
      dout.by_rows(ds, ring.v(stage));
      products_commit();
      if (before >= 0) warp_arrive(ring.empty(before));
      before = stage;

      float weights[8][4];  // P
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          weights[j][e] = power_of_2(fmaf(s[j][e], scale * log2_e, shifts[e / 2]));
        }
      }
      rows.hide_unseen(weights, step.tile, 0);
      started = false;
      if (scores_ahead) {
        ring.next();
        // The four warps start the same products, but may not all have seen that tile.
        known = !warpgroup_any(1 + mine, !look(false));
        started = known && more;
      }
      if (started) {
        start_scores();
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      pin(ds);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[j][e] = weights[j][e] * (ds[j][e] - delta[e / 2]);
      }
      Fragment rounded[4];
      round_to(rounded, ds);
      products_fence();
      add_product(sum, rounded, ring.k(stage));
      products_commit();
      // Each stage has its own room: who writes there next has waited for who reads there now.
      if (dbias) {
        gradients.take(ds, step.tile, step.attending[mine],
                       sums + (stage * groups + mine) * block_rows);
      }
      if (!scores_ahead) {
        ring.next();
        known = look(false);
      }
      if (!known) {
        products_wait<0>();
        pin(sum);
        warp_arrive(ring.empty(stage));  // the ring may wait for it
        before = -1;
        look(true);
      }
    }
    products_wait<0>();
    pin(sum);
    if (before >= 0) warp_arrive(ring.empty(before));
    gradients.write();
    warp_arrive(ring.empty(ring.stage));  // that told of the end
    ring.next();
    warp_arrive(own.empty(0));
    own.next();
    rows.store(sum, {scale, scale}, dq, p, item, add_dq);
  });
#endif
}

}  // namespace

int64_t sparse_attention_scratch(const AttentionProblem& p) {
  return query_numbers_scratch(p) + sparse_key_gradients_scratch(p);
}

void sparse_attention_backward(const AttentionProblem& problem, const Rows<bf16>& q,
                               const Rows<bf16>& k, const Rows<bf16>& v, const Rows<bf16>& o,
                               const Rows<bf16>& dout, const float* lse, float* scratch,
                               const AttentionGrads<bf16>& grads) {
  const AttentionProblem p = check_sizes(problem);
  const float2* numbers = query_pairs(p, o, dout, lse, scratch);
  if (grads.dbias) {
    const auto bytes = static_cast<size_t>(p.B * p.Hkv * p.N * p.blocks()) * sizeof(float);
    check(cudaMemsetAsync(grads.dbias, 0, bytes, stream()), "attention_backward: dbias");
  }
  const PackedRows pack(p.g, block_rows);
  const auto queries = [&](const Rows<bf16>& x) {
    return packed_map(x, p.B, p.Hq, p.N, p.D, pack.heads, pack.queries);
  };
  const auto keys = [&](const Rows<bf16>& x) { return block_map(x, p.B, p.Hkv, p.keys, p.D); };
  by_dense_head_dim(p.D, [&](auto D) {
    using Shape = QueryGradients<D>;
    const int64_t items = SparseItem::items(p, Shape::groups * pack.queries);
    launch("attention_backward: dq", query_gradients<D>,
           std::min<int64_t>(items, multiprocessors()), Shape::threads, Shape::shared_bytes,
           queries(q), keys(k), keys(v), queries(dout), p, pack, numbers, p.scale(), grads.dq,
           grads.add_dq, grads.dbias, p.blocks());
  });
  sparse_key_gradients(p, q, k, v, dout, numbers,
                       reinterpret_cast<char*>(scratch) + query_numbers_scratch(p), grads.dk,
                       grads.dv);
}

}  // namespace entrain::cuda
