// The way back through DashAttention's router on Hopper, second kernel: from dw to dq and parts of
// dkbar.
//
// Gradients are 0 off the support, so that a row tile needs scores only of the chunks that its
// queries route to. A thread block, one warpgroup, goes over row tiles, gathers the summaries of
// their unions, 64 at a time, a pack, and takes
//
//   sweep 1: z -> s, registers; of rows, the sums of s and s dw -> centre = sum s dw / sum s
//   sweep 2: s of the last pack, where it is, of others anew -> dz, bf16, shared
//            -> dq += dz kbar, registers, to rows in shared memory that come and go by TMA;
//            dz^T q -> shared, from where the copy engine adds it to the part's sums, in L2
//
// Mostly one pack is all: each score is then computed once. A block's row tiles are its part of
// dkbar, whose sums no other block adds to, nor it before it has added the last; a last kernel adds
// parts up, in order. What is long in coming is asked for early: thresholds, unions and queries
// while the row tile before is computed, dq while products run; for the rest, the thread blocks of
// a multiprocessor, three or four, overlap what each waits for. What the compiler would keep from
// row tile to row tile is computed anew, as it has no registers for it: a dozen words are spilled.
//
// Floor for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64 at density 0.125: 8192 row tiles, of
// whose pack neighbours that look alike fill about 24 rows of 64; 8 D operations for each of its
// 4096 pairs, 3.4e10, 35 us at 989 TFLOP/s; from and to L2 24 rows of 768 bytes of summaries and of
// 512 of sums, q and dq, 80 KB a row tile in all: 0.65 GB, 0.12 ms; about 2300 instructions a warp,
// 85 us beside both. 0.25 ms were expected, an H100 takes 0.31. Before, with thresholds, unions, q,
// dq and sums each read when it was needed, it took 0.56.
#include "kernels/cuda/route_hopper_gradients.cuh"

namespace entrain::cuda {
namespace {

using namespace route_gradients;

/// Grid: parts times kv heads and batch.
template <int D>
__global__ void __launch_bounds__(threads, Layout<D>::blocks_of_multiprocessor)
    gradients(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dq,
              const __grid_constant__ HopperRouteBackward p) {
#ifdef ENTRAIN_HOPPER
  const uint32_t at = shared_address(dynamic_shared());
  char* const memory = dynamic_shared() + ((at + 1023) / 1024 * 1024 - at);
  const int head = static_cast<int>(blockIdx.x) % p.heads;
  const int part = static_cast<int>(blockIdx.x) / p.heads;
  QueryRows<D> rows(p, q, dq, head, part, memory);
  by_curve(p.route.alpha_gamma[0], [&](const auto& entmax) {
    int row_tile = p.row_tile(part, 0);
    rows.begin(row_tile);
#pragma unroll 1
    for (int x = 1; row_tile < p.row_tiles; ++x) {
      const int next = p.row_tile(part, x);
      rows.take(row_tile, next, entmax);
      row_tile = next;
    }
  });
  rows.end();
#endif
}

}  // namespace

void hopper_route_gradients(const HopperRouteBackward& p, const Rows<bf16>& q,
                            const Rows<bf16>& dq) {
  by_dense_head_dim(p.route.D, [&](auto D) {
    const auto map = [&](const Rows<bf16>& x) {
      return packed_map(x, p.route.B, p.route.Hq, p.route.N, D, p.route.g, p.route.queries);
    };
    launch("route_backward", gradients<D>, int64_t{p.heads} * p.parts, threads,
           Layout<D>::shared_bytes(p.route.queries, p.tiles), map(q), map(dq), p);
  });
}

}  // namespace entrain::cuda
