// Block-sparse attention in bf16 on Hopper, backward, second half: dk = dS^T q / sqrt(D) and
// dv = P^T dO.
//
// An item is a tile of 64 keys of one kv head and a segment of the queries. One warpgroup finds the
// queries of the segment that attend the tile and has their rows of q and dO copied into a ring of
// stages: a step is 64 rows, the g heads of 64 / g such queries, wherever they lie, one copy for
// each run of neighbours and 64 columns. Two more warpgroups take turns at the steps, each with its
// own sums of dk and dv in registers, and at the item's end exchange these, in the shared memory of
// K and V: the first one then has all of dv, the second one all of dk. The first steps of the next
// item wait in the ring by then, and its K and V come while these sums are passed on or written, or
// before where D is 64 and there is room for two items' ones.
//
// Segments serve two ends. A tile that all queries attend is no single long chain of steps. And q
// and dO of a kv head, 4 g D bytes a query, are more than the second-level cache holds (g 16, D
// 128, N 16K: 134 MB), those of a segment are 16 MiB at most: all tiles go through a segment before
// the next one, and read it from there. Items are numbered in that order, but for each kv head's
// first tile: most queries may attend it, so it starts first. Who is free draws the next number
// from a counter, since the masks decide how long an item takes. A tile's sums are passed from its
// segment to the next in memory, in f32: an item's end waits for that of the one before, which has
// a lower number, so that somebody works on it. Hence each sum has one order, that of the queries,
// whoever computes it; which of the two warpgroups has an item's even steps does not show, since
// a + b = b + a.
//
// With few stages what counts is the time from one's being free to its being full again. So a
// warpgroup that finds no step waiting ends its last products and frees their stage first, and
// frees dO before that, where D is 128; and each of those who copy has one thing to do, for which
// all is known before there is room (attention_sparse_steps.cuh).
//
// Floor, B 1, Hq 32, Hkv 2, D 128, N 16K, density 0.125: 5.4e8 pairs of a row and a key, 8 D
// operations each: 5.5e11, 0.61 ms at 900 TFLOP/s. 131072 steps read 4 D bytes and two numbers a
// row: 4.4 GB from the second-level cache, 0.78 ms at 24 bytes a clock and multiprocessor, which
// sets the pace. 2304 items pass on 64 KiB each, written and read: 5% more. An H100 takes
// 1.02 ms, and 1.62 ms at B 4, Hq 16, Hkv 4, D 64. It took 1.38 and 2.2 when all four warps that
// copy went through each step together, 1.14 and 2.1 when each copy was issued in a loop over
// threads (elected() in hopper.cuh): more than half of the 3700 clocks that a filler then needed
// for a step. 1.0 and 1.3 were expected.
//
// At D 128 registers are short: with 8 more for those who copy, the products' ones no longer
// suffice for them to run beside the program.
#include "kernels/cuda/attention_sparse_steps.cuh"

namespace entrain::cuda {
namespace {

using namespace sparse_keys;

#ifdef ENTRAIN_HOPPER

/// Two threads of different thread blocks: what the one has seen or written before it stores, the
/// other one sees after it has loaded that.
__device__ __forceinline__ int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(int* to, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ float4 four(const float (&x)[4]) {
  return {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void add_four(float (&sum)[4], const float4& x) {
  sum[0] += x.x;
  sum[1] += x.y;
  sum[2] += x.z;
  sum[3] += x.w;
}

/// Gives one of a warpgroup's sums to the other warpgroup and adds what that one gives to the other
/// sum, half the columns at a time. to and from: a block of shared memory for each.
template <int n>
__device__ __forceinline__ void exchange(const float (&give)[n][4], float (&keep)[n][4], float4* to,
                                         const float4* from) {
  const int thread = static_cast<int>(threadIdx.x) % warpgroup;
#pragma unroll
  for (int half = 0; half < n; half += n / 2) {
    meet(2, consumers * warpgroup);  // the blocks are free
#pragma unroll
    for (int j = 0; j < n / 2; ++j) to[j * warpgroup + thread] = four(give[half + j]);
    meet(2, consumers * warpgroup);
#pragma unroll
    for (int j = 0; j < n / 2; ++j) add_four(keep[half + j], from[j * warpgroup + thread]);
  }
}

/// Adds what earlier segments have left of the sum of an item's tile, and leaves it to the next
/// segment or writes it to dv (which 0) or dk (which 1).
template <int n>
__device__ __forceinline__ void pass_on(const Work& w, int number, int which, float (&sum)[n][4]) {
  const int thread = static_cast<int>(threadIdx.x) % warpgroup;
  const Item item(w.items, number);
  const SeeingSegments seeing(w.p, w.items, item.tile);
  const int64_t place = (int64_t{item.kv_head} * w.items.tiles + item.tile) * 2 + which;
  int* passed = w.passed + place;
  float4* sums = w.sums + place * n * warpgroup + thread;
  if (item.segment > seeing.first) {
    if (thread == 0) {  // each time empties the first-level cache
      while (load_acquire(passed) != item.segment) __nanosleep(100);
    }
    meet(3 + which, warpgroup);
#pragma unroll
    for (int j = 0; j < n; ++j) add_four(sum[j], __ldcg(sums + j * warpgroup));
  }
  if (item.segment < seeing.last) {
#pragma unroll
    for (int j = 0; j < n; ++j) __stcg(sums + j * warpgroup, four(sum[j]));
    meet(3 + which, warpgroup);
    if (thread == 0) store_release(passed, item.segment + 1);
    return;
  }
  store_sums(sum, which == 0 ? 1 : w.scale, which == 0 ? w.dv : w.dk, item.b, item.r,
             item.tile * key_tile, static_cast<int>(w.p.keys));
}

/// The work of a warpgroup that computes; mine: 0 or 1.
template <int D>
__device__ __forceinline__ void add_items(const Work& w, int mine, Memory<D>& memory) {
  auto& ring = memory.ring;
  auto& douts = memory.douts;
  auto& own = memory.own;
  const auto next_turn = [&] {
    for (int i = 0; i < consumers; ++i) ring.next();
  };
  const int lane_column = static_cast<int>(threadIdx.x) % 4 * 2;
  const int lane_key =
      static_cast<int>(threadIdx.x) % warpgroup / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  if (mine == 1) {
    ring.next();
    douts.next();
  }
  for (;; own.next()) {
    own.wait_full();
    const int n = memory.items[own.stage];
    if (n < 0) return;
    const OwnBlock<D, false> k(memory.k(own.stage)), v(memory.v(own.stage));

    float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
    pin(dk_sum);
    pin(dv_sum);
    // The stages whose rows the last products may still read.
    int before = -1, dout_before = -1;
    const auto free_before = [&] {
      if (before < 0) return;
      warp_arrive(ring.empty(before));
      if constexpr (D == 64) warp_arrive(douts.empty(dout_before));
    };
    const auto finish = [&] {
      products_wait<0>();
      pin(dk_sum);
      pin(dv_sum);
      free_before();
      before = -1;
    };
    for (;; next_turn()) {
      if (!ring.is_full()) {
        finish();  // the copies that are waited for may wait for that stage
        ring.wait_full();
      }
      const int stage = ring.stage, dout_stage = douts.stage;
      const Step& step = memory.steps[stage];
      if (step.kind == Step::end) break;
      const uint32_t log_sums = shared_address(step.log_sums + lane_column);
      const uint32_t deltas = shared_address(step.deltas + lane_column);
      add_key_gradients<D>(
          dk_sum, dv_sum, k, v, memory.q(stage), memory.dout(dout_stage), w.scale * log2_e,
          [&](int j) { return load_pair(log_sums + 32 * j); }, deltas, free_before,
          [&](float(&weights)[8][4]) {
            if (step.kind == Step::whole) return;
            const int key = Item(w.items, n).tile * key_tile + lane_key;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const KeyRange seen = step.seen[8 * j + lane_column + e % 2];
                const int at = key + e / 2 * 8;
                if (at < seen.begin || at >= seen.end) weights[j][e] = 0;
              }
            }
          },
          [&] { warp_arrive(douts.empty(dout_stage)); });
      before = stage;
      dout_before = dout_stage;
      for (int i = 0; i < consumers; ++i) douts.next();
    }
    finish();
    warp_arrive(ring.empty(ring.stage));
    next_turn();

    float4 *first = memory.room(2 * own.stage), *second = memory.room(2 * own.stage + 1);
    if (mine == 0) {
      exchange(dk_sum, dv_sum, first, second);
    } else {
      exchange(dv_sum, dk_sum, second, first);
    }
    show_to_engines();  // the next keys and values come after what was exchanged there
    warp_arrive(own.empty(own.stage));
    if (mine == 0) {
      pass_on(w, n, 0, dv_sum);
    } else {
      pass_on(w, n, 1, dk_sum);
    }
  }
}

#endif  // ENTRAIN_HOPPER

template <int D>
__global__ void __launch_bounds__(threads, 1)
    key_gradients(const __grid_constant__ Maps maps, const __grid_constant__ Work w) {
#ifdef ENTRAIN_HOPPER
  Memory<D> memory;
  if (threadIdx.x == 0) {
    memory.init();
    barrier_init_done();
  }
  // What a step has beside its queries' rows stays zeros.
  constexpr int own_blocks = 2 * Memory<D>::own_stages;
  for (int i = static_cast<int>(threadIdx.x);
       i < (Memory<D>::barriers_at - own_blocks * Memory<D>::block_bytes) / 16; i += threads) {
    memory.room(own_blocks)[i] = {0, 0, 0, 0};
  }
  show_to_engines();
  __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x) / warpgroup);
  if (group == 0) {
    fewer_registers<D == 64 ? 72 : 24>();
    copy_items(w, maps, memory);
  } else {
    more_registers<D == 64 ? 216 : 240>();
    add_items(w, group - 1, memory);
  }
#endif
}

/// Where scratch holds what.
struct Scratch {
  int64_t passed, sums, bytes;

  explicit Scratch(const AttentionProblem& p) {
    const int64_t sums_count = p.B * p.Hkv * ceil_div(p.keys, key_tile) * 2;
    passed = 16;  // after the counter of items
    sums = passed + ceil_div(sums_count * int64_t{sizeof(int)}, 16) * 16;
    bytes = sums + sums_count * key_tile * p.D * int64_t{sizeof(float)};
  }
};

}  // namespace

int64_t sparse_key_gradients_scratch(const AttentionProblem& p) {
  return Scratch(p).bytes;
}

void sparse_key_gradients(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                          const Rows<bf16>& v, const Rows<bf16>& dout, const float2* numbers,
                          void* scratch, const Rows<bf16>& dk, const Rows<bf16>& dv) {
  const Items items(p);
  const Scratch places(p);
  auto* bytes = static_cast<char*>(scratch);
  check(cudaMemsetAsync(scratch, 0, static_cast<size_t>(places.sums), stream()), "dk and dv");
  const PackedRows pack(p.g, block_rows);
  const Work w{p,
               items,
               pack,
               dk,
               dv,
               numbers,
               p.scale(),
               reinterpret_cast<int*>(bytes),
               reinterpret_cast<int*>(bytes + places.passed),
               reinterpret_cast<float4*>(bytes + places.sums)};
  Maps maps{block_map(k, p.B, p.Hkv, p.keys, p.D), block_map(v, p.B, p.Hkv, p.keys, p.D), {}, {}};
  for (int i = 0; i < Maps::runs && 1 << i <= pack.queries; ++i) {
    maps.q[i] = packed_map(q, p.B, p.Hq, p.N, p.D, pack.heads, 1 << i);
    maps.dout[i] = packed_map(dout, p.B, p.Hq, p.N, p.D, pack.heads, 1 << i);
  }
  by_dense_head_dim(p.D, [&](auto D) {
    launch("attention_backward: dk and dv", key_gradients<D>,
           std::min<int64_t>(items.count(), multiprocessors()), threads, Memory<D>::bytes, maps, w);
  });
}

}  // namespace entrain::cuda
