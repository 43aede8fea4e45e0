// The way back through DashAttention's router on Hopper, third part: dkbar = scale dz^T q.
//
// A thread block takes 128 chunks of a kv head, 64 for each of two warpgroups, whose summaries stay
// in shared memory, and a segment of the row tiles that route over them, which go through a ring of
// stages:
//
//   q, shared -> f16, registers -> z, registers -> dz, bf16, shared -> dkbar += dz^T q, registers
//
// Blocks that run together share rows of q in L2. Sums of segments go to scratch, and from there in
// order to dkbar.
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64: 6.7e7 pairs of a row and a candidate,
// 6 D operations each: 5.2e10, 52 us at 989 TFLOP/s; a row tile of 16 KB for each block's 1540
// cycles of products, 11 of L2's 24 bytes a cycle; about 15 other operations a pair, 35 us.
#include <cmath>

#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda {
namespace {

template <int D>
struct ChunkHalf {
  static constexpr int groups = 2, threads = (groups + 1) * warpgroup;
  static constexpr int block_bytes = D / 64 * panel_bytes;
  static constexpr int stages = D == 64 ? 8 : 5;
  // Summaries, the ring's rows, dz, dw, barriers.
  static constexpr int ring_at = groups * 2 * block_bytes;
  static constexpr int dz_at = ring_at + stages * block_bytes;
  static constexpr int dw_at = dz_at + groups * panel_bytes;
  static constexpr int barriers_at = dw_at + groups * RowTile::bytes;
  static constexpr int shared_bytes = 1024 + barriers_at + 8 * (2 * stages + 1);
};

/// What a thread block has to do.
struct ChunkItem {
  RouteItem of;  // its tiles are the warpgroups'
  int segment;
  int begin, end;  // row tiles

  __device__ ChunkItem(const HopperRouteBackward& p, int index, int groups) {
    const int head = index % p.heads, pairs = (p.tiles + groups - 1) / groups;
    const int first = index / p.heads % pairs * groups;
    of = {head / p.route.Hkv, head % p.route.Hkv, 0, first, first + groups};
    segment = p.segments - 1 - index / p.heads / pairs;
    begin = p.row_tiles;
    for (int tile = of.begin; tile < of.end; ++tile) begin = min(begin, p.first_row_tile(tile));
    begin = max(begin, segment * p.segment);
    end = min((segment + 1) * p.segment, p.row_tiles);
  }
};

/// Starts copies of a tile's columns of the warpgroup's rows of dbias, `count` queries from `from`
/// on, to the first rows of a table; zeros after the last query and chunk.
__device__ __forceinline__ void copy_columns(const RowTile& to, const float* from,
                                             const HopperRoute& p, int tile, int count) {
  const int column = static_cast<int>(threadIdx.x) % 64, c = 64 * tile + column;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) % warpgroup / 64; i < p.queries; i += 2) {
    copy_async<4>(shared_address(to.at(i, column)), from + int64_t{i} * p.M + c,
                  i < count && c < p.M);
  }
}

/// From a tile's scores to their gradients. row: of dw, for the thread's two rows.
template <class Entmax>
__device__ __forceinline__ void score_gradients(float (&z)[8][4], const Entmax& entmax,
                                                const RowNumbers (&numbers)[2], const RowTile& dw,
                                                const int (&row)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float threshold = numbers[i].threshold, centre = numbers[i].centre;
      const float2 d = dw.pair(row[i], j);
      float* both = &z[j][2 * i];
      both[0] = entmax.weight(both[0], threshold) * (d.x - centre);
      both[1] = entmax.weight(both[1], threshold) * (d.y - centre);
    }
  }
}

/// Writes an accumulator, rounded, to a block of one panel.
__device__ __forceinline__ void put_rounded(const float (&from)[8][4], char* to) {
  const int thread = static_cast<int>(threadIdx.x) % warpgroup;
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    char* at = to + row * 128 + (j ^ row % 8) * 16 + thread % 4 * 4;
    *reinterpret_cast<uint32_t*>(at) = pack(from[j][0], from[j][1]);
    *reinterpret_cast<uint32_t*>(at + 8 * 128) = pack(from[j][2], from[j][3]);
  }
}

/// One of the warpgroups that sum.
template <int D, class Entmax>
__device__ __forceinline__ void sum_chunks(const HopperRouteBackward& p, const ChunkItem& item,
                                           const Entmax& entmax, char* memory,
                                           Ring<ChunkHalf<D>::stages> ring, uint32_t own) {
  using Shape = ChunkHalf<D>;
  const auto thread = static_cast<int>(threadIdx.x);
  const int mine = thread / warpgroup, meeting = 1 + mine, tile = item.of.begin + mine;
  const uint32_t summaries = shared_address(memory) + mine * 2 * Shape::block_bytes;
  char* const dz = memory + Shape::dz_at + mine * panel_bytes;
  const RowTile dw(memory + Shape::dw_at + mine * RowTile::bytes);
  RouteRows<D> rows(p.route);
  int row[2];  // of dw; nobody's rows take the last
#pragma unroll
  for (int i = 0; i < 2; ++i) row[i] = min(rows.lane_row(i) / p.route.g, p.route.queries - 1);
  const int first = max(item.begin, p.first_row_tile(tile));

  float sum[D / 8][4] = {};
  pin(sum);
  int before = 0;
  barrier_wait(own, 0);
#pragma unroll 1
  for (int t = item.begin; t < item.end; ++t) {
    const int stage = ring.stage;
    if (t < first) {  // the other warpgroup's chunks are earlier
      ring.wait_full();
      warp_arrive(ring.empty(stage));
      ring.next();
      continue;
    }
    const int query = t * p.route.queries;
    const RowNumbers* at = p.rows_of(item.of, t);
    const RowNumbers numbers[2] = {at[rows.lane_row(0)], at[rows.lane_row(1)]};
    copy_columns(dw, p.dbias_of(item.of, query), p.route, tile, p.route.N - query);
    const Block q{shared_address(memory) + Shape::ring_at + stage * Shape::block_bytes};
    ring.wait_full();
    rows.load(q);
    float z[8][4];
    rows.multiply(z, summaries);  // the last product is complete, too
    if (t > first) warp_arrive(ring.empty(before));
    rows.end[0] = numbers[0].end;
    rows.end[1] = numbers[1].end;
    rows.scale(z, tile);
    wait_copies();
    warpgroup_sync(meeting);  // dw has come, and nobody reads the last dz
    score_gradients(z, entmax, numbers, dw, row);
    put_rounded(z, dz);
    show_to_engines();
    warpgroup_sync(meeting);
    products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      product_of_columns(sum, Block{shared_address(dz)}.columns(step), q.columns(step), true);
    }
    products_commit();
    before = stage;
    ring.next();
  }
  products_wait<0>();
  pin(sum);
  if (first >= item.end) return;
  const int head = item.of.b * p.route.Hkv + item.of.r;
  float* to = p.sums_of(head, item.segment, tile) + thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<float2*>(to + rows.lane_row(i) * D + 8 * j) =
          make_float2(sum[j][2 * i], sum[j][2 * i + 1]);
    }
  }
}

/// Grid: segments, the last ones first, times chunks, 128 each, times kv heads and batch.
template <int D>
__global__ void __launch_bounds__(ChunkHalf<D>::threads, 1)
    chunk_gradients(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap high,
                    const __grid_constant__ CUtensorMap low,
                    const __grid_constant__ HopperRouteBackward p) {
#ifdef ENTRAIN_HOPPER
  using Shape = ChunkHalf<D>;
  const auto thread = static_cast<int>(threadIdx.x);
  const ChunkItem item(p, static_cast<int>(blockIdx.x), Shape::groups);
  if (item.begin >= item.end) return;
  const uint32_t at = shared_address(dynamic_shared()), shared = (at + 1023) / 1024 * 1024;
  char* const memory = dynamic_shared() + (shared - at);
  Ring<Shape::stages> ring{shared + Shape::barriers_at};
  const uint32_t own = ring.barriers + 8 * 2 * Shape::stages;
  if (thread == 0) {
    Ring<Shape::stages>::init(ring.barriers, 4 * Shape::groups);
    barrier_init(own, Shape::groups);
    barrier_init_done();
  }
  // Nobody's rows take part in sums over rows.
  const int used = p.route.queries * p.route.g * 128;
  for (int panel = 0; panel < Shape::stages * D / 64; ++panel) {
    char* rows = memory + Shape::ring_at + panel * panel_bytes;
    for (int x = used + 16 * thread; x < panel_bytes; x += 16 * Shape::threads) {
      *reinterpret_cast<uint4*>(rows + x) = uint4{};
    }
  }
  show_to_engines();
  __syncthreads();

  if (thread / warpgroup == Shape::groups) {
    fewer_registers<24>();
    if (thread % warpgroup != 0) return;
    for (int i = 0; i < Shape::groups; ++i) {
      copy_tile<D>(shared + i * 2 * Shape::block_bytes, high, low, own, item.of, item.of.begin + i);
    }
    for (int t = item.begin; t < item.end; ++t) {
      ring.wait_empty();
      copy_rows<D>(Block{shared + Shape::ring_at + ring.stage * Shape::block_bytes}, q_map,
                   ring.full(), p.route, item.of, t * p.route.queries);
      ring.next();
    }
    return;
  }
  more_registers<240>();
  by_curve(p.route.alpha_gamma[0],
           [&](const auto& entmax) { sum_chunks<D>(p, item, entmax, memory, ring, own); });
#endif
}

/// dkbar = scale times the segments' sums, in order; 0 where no query has such a candidate.
__global__ void __launch_bounds__(256)
    sum_segments(const __grid_constant__ HopperRouteBackward p, int64_t total, double* dkbar) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= total) return;
  const int64_t row = x / p.route.D;
  const int head = static_cast<int>(row / p.route.M), c = static_cast<int>(row % p.route.M);
  const int first = p.first_row_tile(c / 64), d = static_cast<int>(x % p.route.D);
  const float* from = p.sums_of(head, 0, c / 64) + c % 64 * p.route.D + d;
  const int64_t step = int64_t{p.tiles} * block_rows * p.route.D;
  double sum = 0;
  if (first < p.row_tiles) {
#pragma unroll 8
    for (int i = first / p.segment; i < p.segments; ++i) sum += from[i * step];
  }
  dkbar[x] = p.route.alpha_gamma[1] / sqrt(static_cast<double>(p.route.D)) * sum;
}

}  // namespace

void hopper_route_dkbar(const HopperRouteBackward& p, const CUtensorMap& q,
                        const Summaries& summaries, double* dkbar) {
  by_dense_head_dim(p.route.D, [&](auto D) {
    using Shape = ChunkHalf<D>;
    const int64_t blocks = int64_t{p.heads} * p.segments * ceil_div(p.tiles, Shape::groups);
    launch("route_backward: dkbar", chunk_gradients<D>, blocks, Shape::threads, Shape::shared_bytes,
           q, Summaries::map(summaries.high), Summaries::map(summaries.low), p);
  });
  const int64_t total = int64_t{p.heads} * p.route.M * p.route.D;
  launch("route_backward: sums", sum_segments, ceil_div(total, 256), 256, 0, p, total, dkbar);
}

}  // namespace entrain::cuda
