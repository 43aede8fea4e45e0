// Attention in bf16 of a sequence's last few queries, as while decoding: splits of the keys run
// beside each other, then merge ("Flash-Decoding", Dao et al. 2023,
// crfm.stanford.edu/2023/10/12/flashdecoding.html).
//
//   attended tiles of k and v --cp.async, 192 KB of rings--> shared
//   a warp, 16 keys of each tile: S = q k^T -> P -> sums += P v, registers [rows, D]
//   sums of 8 warps --shared--> of a split --other blocks' shared, or L2--> of all -> o, lse
//
// Grid: (queries x kv heads x batch, splits, parts of the group). A block's 16 or 32 rows are heads
// of the group, of one or several queries. It counts the tiles that its queries attend, takes an
// equal share of them, four warps the first half of it and four the second, and each warp goes
// through its half by itself, with a ring of copies of its own: no barriers between them until the
// end.
//
// Where masks choose tiles, on Hopper, the splits of a group are a cluster of up to 16 blocks. All
// keys are worth more splits than that, which merge through L2; of these, blocks whose share would
// be too small for the cost of merging it leave at once.
//
// The time is that of reading k and v once. Hq 32, Hkv 2, D 128, 98304 keys: all of them, batch 8,
// are 805 MB, 0.29 ms at 2.8 TB/s; the 96 of 1536 tiles that density 0.0625 leaves, 50 MB, 18 us.
// An H100 takes 28 us. Four warps a block took 26, though they waited for copies for a quarter of
// that only, and 21 was expected of eight. Batch 1: 6.3 MB by 32 blocks, all of it on its way at
// once, 2 us; it takes 10 (11 by four warps). Operations are 64 for each byte; what was read is
// counted while the first copies are on their way.
#include "kernels/cuda/attention_bf16.cuh"
#include "kernels/cuda/attention_read.cuh"
#include "kernels/cuda/decode_splits.cuh"
#include "kernels/cuda/decode_tiles.cuh"
#include "kernels/cuda/launch_after.cuh"
#include "kernels/cuda/score_tile.cuh"

namespace entrain::cuda {
namespace {

constexpr int64_t most_queries = 8;  // of a sequence: with more, tiles of queries are the way
constexpr int warps = decode_threads / 32;
constexpr int tile_warps = warps / 2, warp_keys = key_tile / tile_warps;  // two tiles at a time

constexpr int most_of_cluster = 16;
constexpr int least_tiles = 4;  // of a split

/// Shared memory: q, Small, the warps' rings or, after them, their sums, AttendedTiles. The rings
/// have 192 KB, or 128 where a multiprocessor has less; only the larger ones have room for what the
/// blocks of a cluster send.
template <int D, int slabs, bool large>
struct Decode {
  static constexpr int rows = 16 * slabs;
  static constexpr int stages = (large ? 384 : 256) / D;
  static constexpr size_t place_bytes = 2 * SharedTile<D>::bytes(warp_keys);  // of keys and values
  static constexpr size_t ring_bytes = stages * place_bytes;
  static constexpr int sum_step = D + 8;  // from row to row of sums: rows lie in different banks
  static constexpr size_t sum_bytes = sizeof(float) * warps * rows * sum_step;
  static constexpr size_t work_bytes = std::max(warps * ring_bytes, sum_bytes);

  struct alignas(128) Small {
    uint64_t sent;  // a barrier: what the cluster's blocks send this one
    RowWeight weights[warps * rows];
    float biases[warps][stages][most_queries];
  };
  static size_t shared_bytes(const AttentionProblem& p) {
    return SharedTile<D>::bytes(rows) + sizeof(Small) + work_bytes + AttendedTiles::bytes(p);
  }
};

/// Calls f(row, d) for the block's rows, four columns from d on in each thread.
template <int rows, int D, class F>
__device__ __forceinline__ void for_columns(const QueryTile& queries, F f) {
  for (int x = static_cast<int>(threadIdx.x); x < rows * D / 4; x += decode_threads) {
    const int row = x / (D / 4);
    if (queries.has(row)) f(row, x % (D / 4) * 4);
  }
}

/// Makes weights of a row's scores, and scales what came before to the same top. i: which of a
/// slab's rows that a thread has.
template <int columns>
__device__ __forceinline__ void weigh(float (&s)[2][4], float (&sums)[columns][4],
                                      RowWeight& weight, int i, float scale, float bias) {
  float most = -INFINITY;  // fmaxf passes over NaN; the exponentials below do not
#pragma unroll
  for (int j = 0; j < 2; ++j) most = fmaxf(most, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  const float top = fmaxf(weight.top, most * scale + bias);
  const float correction = rescale(weight.top, top);
  const float shift = top == -INFINITY ? bias : bias - top;
  weight.top = top;
  weight.sum *= correction;
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    sums[j][2 * i] *= correction;
    sums[j][2 * i + 1] *= correction;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 2 * i; e < 2 * i + 2; ++e) {
      s[j][e] = power_of_2(fmaf(s[j][e], scale, shift));
      weight.sum += s[j][e];
    }
  }
}

/// Leaves the warps' weights [warps, rows] and, once all threads are here, in the place of rings
/// their sums [warps, rows, sum_step], scaled alike. A barrier must follow.
template <class Shape, int slabs, int columns>
__device__ __forceinline__ void leave_sums(const float (&sums)[slabs][columns][4],
                                           RowWeight (&weight)[slabs][2], RowWeight* weights,
                                           float* warp_sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[m][i].sum = quad_sum(weight[m][i].sum);
      if (lane % 4 == 0) weights[warp * Shape::rows + 16 * m + 8 * i + lane / 4] = weight[m][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * m + 8 * i + lane / 4;
      const float top = merge(weights + row, warps, Shape::rows).top;
      const float factor = rescale(weight[m][i].top, top);
      float* to = warp_sums + (warp * Shape::rows + row) * Shape::sum_step + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) =
            make_float2(sums[m][j][2 * i] * factor, sums[m][j][2 * i + 1] * factor);
      }
    }
  }
}

/// Counts what the queries read, a warp each.
__device__ void count_read(const AttentionProblem& p, const QueryTile& queries,
                           const ReadSums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = warp; i < queries.count; i += warps) {
    ReadCount count;
    count.add(p, queries.b, queries.r, queries.first + i, lane, 32);
    for (int64_t* of : {&count.pairs, &count.visits, &count.queries, &count.causal}) {
      *of = warp_sum(*of);
    }
    if (lane == 0) sums.add(p, queries.r, count);
  }
}

template <int D, int slabs, bool large>
__global__ void __launch_bounds__(decode_threads, 1)
    decode_kernel(const __grid_constant__ AttentionProblem p, const Rows<bf16> q,
                  const Rows<bf16> k, const Rows<bf16> v, const Rows<bf16> o, float* lse,
                  const PackedRows pack, float scale, bool clustered, const ReadSums read) {
  using Shape = Decode<D, slabs, large>;
  constexpr int rows = Shape::rows, stages = Shape::stages;
#ifdef ENTRAIN_HOPPER
  if (!large) clustered = false;  // so that no code is made of it
#else
  clustered = false;
#endif
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const QueryTile queries(p, pack, static_cast<int>(blockIdx.z) * pack.heads);

  char* shared = dynamic_shared();
  const SharedTile<D> q_tile{shared_address(shared)};
  auto& small = *reinterpret_cast<typename Shape::Small*>(shared + SharedTile<D>::bytes(rows));
  char* rings = shared + SharedTile<D>::bytes(rows) + sizeof(typename Shape::Small);
  const uint32_t ring = shared_address(rings + warp * Shape::ring_bytes);
  const auto k_tile = [&](int place) {
    return SharedTile<D>{ring + place * static_cast<uint32_t>(Shape::place_bytes)};
  };
  const auto v_tile = [&](int place) {
    return SharedTile<D>{k_tile(place).address +
                         static_cast<uint32_t>(SharedTile<D>::bytes(warp_keys))};
  };

  const uint32_t sent = shared_address(&small.sent);
  const int split = static_cast<int>(blockIdx.y), most = static_cast<int>(gridDim.y);
  if (clustered && threadIdx.x == 0) {
    barrier_init(sent, 1);
    barrier_init_done();
    barrier_arrive_expecting(sent, ClusterMerge<D, rows>::bytes(queries, split, most));
  }
  wait_for_previous();
  let_next_begin();

  if (threadIdx.x < attention_threads) queries.copy<rows>(q, q_tile, D, true);
  commit_copies();
  const AttendedTiles tiles(p, queries, rings + Shape::work_bytes);
  __syncthreads();
  const int count = tiles.count();
  const int splits = clustered ? most : max(1, min(most, (count + least_tiles - 1) / least_tiles));
  if (split >= splits) return;
  const int half = 2 * split + warp / tile_warps;  // the share of four warps
  const int begin = count * half / (2 * splits);
  const int share = count * (half + 1) / (2 * splits) - begin;
  const HeadRows k_rows(k, queries.b, queries.r), v_rows(v, queries.b, queries.r);
  const int own_key = warp % tile_warps * warp_keys;  // of a tile
  constexpr int row_lanes = D / 8;
  const uint32_t lane_row = lane / row_lanes, lane_chunk = lane % row_lanes;
  const uint32_t lane_place = SharedTile<D>{0}.chunk(lane_row, lane_chunk);
  const auto fetch = [&](int tile, int place) {
    const int key = tile * key_tile + own_key + static_cast<int>(lane_row);
    const int left = static_cast<int>(p.keys) - key;
    const bf16* k_from = k_rows.at(0, key) + 8 * lane_chunk;
    const bf16* v_from = v_rows.at(0, key) + 8 * lane_chunk;
#pragma unroll
    for (uint32_t i = 0; i < warp_keys; i += 32 / row_lanes) {
      // As chunk() has it: the bits of i and lane_row do not meet.
      const uint32_t at = (lane_place ^ i % 8 * 16) + i * SharedTile<D>::row_bytes;
      const bool valid = static_cast<int>(i) < left;
      copy_async<16>(k_tile(place).address + at, k_from + i * k_rows.token_step, valid);
      copy_async<16>(v_tile(place).address + at, v_from + i * v_rows.token_step, valid);
    }
    if (p.bias && lane < queries.count) {
      copy_async<4>(shared_address(&small.biases[warp][place][lane]),
                    p.bias + (queries.index(p) + lane) * p.bias_blocks + tile, true);
    }
  };

  AttendedTiles::Walk ahead(tiles, begin), now = ahead;
#pragma unroll 1
  for (int place = 0; place < stages; ++place) {
    if (place < share) fetch(ahead.next(), place);
    commit_copies();
  }
  if (read.read && split == 0 && blockIdx.z == 0) count_read(p, queries, read);
  wait_copies_but<stages>();
  __syncthreads();  // q is here
  const LeftOperand<D, slabs> q_operand(q_tile, 0);

  float sums[slabs][D / 8][4] = {};
  RowWeight weight[slabs][2];
  KeyRange seen[slabs][2];
#pragma unroll
  for (int m = 0; m < slabs; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * m + 8 * i + lane / 4;
      weight[m][i] = {-INFINITY, 0};
      seen[m][i] = queries.has(row) ? seen_by(p, queries.query(row)) : KeyRange{0, 0};
    }
  }

  for (int t = 0, place = 0; t < share; ++t) {
    wait_copies_but<stages - 1>();
    __syncwarp();  // this tile is here

    float s[slabs][2][4] = {};
    rows_by_rows(s, q_operand, k_tile(place), 0);

    const int tile = now.next(), key = tile * key_tile + own_key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < slabs; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = min(pack.query(16 * m + 8 * i + lane / 4), queries.count - 1);
        const bool on = tiles.of(query, tile);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = key + j / 2 * 8 + j % 2;
          if (!on || at < seen[m][i].begin || at >= seen[m][i].end) {
            s[m][j / 2][2 * i + j % 2] = -INFINITY;
          }
        }
        const float given = small.biases[warp][place][query] * log2_e;  // anything, if none are
        const float bias = p.bias && on ? given : 0;
        weigh(s[m], sums[m], weight[m][i], i, scale, bias);
      }
    }
    weighted_rows(sums, s, v_tile(place), 0);
    __syncwarp();  // nobody uses it any more
    if (t + stages < share) fetch(ahead.next(), place);
    commit_copies();
    place = place == stages - 1 ? 0 : place + 1;
  }

  if (clustered) cluster_arrive();  // this warp's ring is free for what others send
  auto* warp_sums = reinterpret_cast<float*>(rings);
  auto& cluster = *reinterpret_cast<ClusterMerge<D, rows>*>(rings + Shape::sum_bytes);
  static_assert(!large || Shape::sum_bytes + sizeof cluster <= Shape::work_bytes);
  leave_sums<Shape>(sums, weight, small.weights, warp_sums);
  __syncthreads();
  if (clustered) cluster_meet();

  const Output output{p, queries, queries.heads(o), lse};
  const int group = static_cast<int>(blockIdx.x + blockIdx.z * gridDim.x);
  const int first_part = group * static_cast<int>(gridDim.y) * rows;
  for_columns<rows, D>(queries, [&](int row, int d) {
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float* from = warp_sums + (w * rows + row) * Shape::sum_step + d;
      add_scaled(sum, *reinterpret_cast<const float4*>(from), 1);
    }
    const RowWeight all = merge(small.weights + row, warps, rows);
    if (splits == 1) return output.put(row, d, sum, all);
    if (clustered) return cluster.send(split, splits, row, d, sum, all, sent);
    const int part = first_part + split * rows + row;
    *reinterpret_cast<float4*>(split_sums + part * D + d) = sum;
    if (d == 0) split_weights[part] = all;
  });
  if (splits == 1) return;
  if (clustered) {
    barrier_wait(sent, 0);
    return cluster.put(output, split, splits);
  }

  if (!last_of_splits(group, splits)) return;
  merge_splits<D, rows>(output, first_part, splits, *reinterpret_cast<Merge<rows>*>(rings));
}

/// Of so many blocks, those that form a cluster: a power of two, such that the clusters of all
/// groups run at once. 1 where there are none.
template <class Kernel>
int cluster_of(Kernel kernel, const dim3& groups, int64_t blocks, size_t bytes) {
  if (!on_hopper()) return 1;
  for (unsigned n = most_of_cluster; n > 1; n /= 2) {
    if (n > blocks) continue;
    const LaunchAfter of({groups.x, n, groups.z}, decode_threads, bytes, {1, n, 1});
    const int at_once = of.clusters_at_once("attention_decode", kernel);
    if (at_once >= static_cast<int>(groups.x * groups.z)) return static_cast<int>(n);
  }
  return 1;
}

/// Whether this GPU's shared memory sufficed.
template <int D, int slabs, bool large>
bool decode(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
            const Rows<bf16>& v, const Rows<bf16>& o, float* lse, const ReadSums& sums) {
  using Shape = Decode<D, slabs, large>;
  const size_t bytes = Shape::shared_bytes(p);
  if (bytes > static_cast<size_t>(SharedMemory::of_device().most)) return false;
  const PackedRows pack(p.g, Shape::rows);
  const int64_t tiles = QueryTile::tiles(p, pack), parts = ceil_div(p.g, pack.heads);
  const int64_t useful = ceil_div(ceil_div(p.keys, key_tile), least_tiles);
  const int64_t at_once = std::min(most_split_blocks, multiprocessors());
  const int64_t splits =
      std::max<int64_t>(1, std::min({useful, int64_t{most_splits}, at_once / (tiles * parts)}));
  dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits),
            static_cast<unsigned>(parts));
  dim3 cluster(1, 1, 1);
  const auto kernel = decode_kernel<D, slabs, large>;
  if (p.mask && large) cluster.y = cluster_of(kernel, grid, splits, bytes);
  if (cluster.y > 1) grid.y = cluster.y;
  LaunchAfter(grid, decode_threads, bytes, cluster)("attention_decode", kernel, p, q, k, v, o, lse,
                                                    pack, p.scale() * log2_e, cluster.y > 1, sums);
  return true;
}

}  // namespace

bool attention_decode(const AttentionProblem& problem, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& o, float* lse, const ReadSums& sums) {
  const bool chosen = problem.mask || problem.bias;
  if (q.dtype != DType::bf16 || problem.N > most_queries || (problem.D != 64 && problem.D != 128) ||
      (chosen && problem.block != key_tile)) {
    return false;
  }
  const AttentionProblem p = check_sizes(problem);
  const Rows<bf16> q_rows(q), k_rows(k), v_rows(v), o_rows(o);
  if (!wide_rows(p, {q_rows, k_rows, v_rows, o_rows})) return false;
  const auto with = [&]<int D, int slabs>() {
    return decode<D, slabs, true>(p, q_rows, k_rows, v_rows, o_rows, lse, sums) ||
           decode<D, slabs, false>(p, q_rows, k_rows, v_rows, o_rows, lse, sums);
  };
  const auto run = [&]<int D>(std::integral_constant<int, D>) {
    return p.g * p.N <= 16 ? with.template operator()<D, 1>() : with.template operator()<D, 2>();
  };
  return p.D == 64 ? run(std::integral_constant<int, 64>{})
                   : run(std::integral_constant<int, 128>{});
}

}  // namespace entrain::cuda
