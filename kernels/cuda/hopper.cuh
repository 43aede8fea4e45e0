#pragma once
// What Hopper adds (compute capability 9.0, code for sm_90a): barriers in shared memory that count
// bytes, the engine that copies tiles beside the computation (TMA), and products of four warps
// together (wgmma) whose right operand lies in shared memory.
//
// The unit of all of them is a block of 64 rows of bf16, in panels of 64 columns. A panel is 8192
// bytes at a multiple of 1024: a row takes 128, its 16-byte chunk c is at place c ^ row % 8.
//
// A warpgroup's accumulator of 64 rows is four warps' accumulators of mma.cuh, 16 rows each, and so
// is its left operand from registers.
#include <cuda.h>

#include "kernels/cuda/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ENTRAIN_HOPPER 1  // this pass compiles for sm_90a; others leave kernels empty
#endif

namespace entrain::cuda {

constexpr int warpgroup = 128;
constexpr int block_rows = 64;
constexpr int panel_bytes = block_rows * 128;

/// Whether the GPU is one.
bool on_hopper();

/// How the copy engine finds blocks of [B, H, N, D] rows; coordinates are column, row, head, batch.
/// Rows outside [0, N) are zeros.
CUtensorMap block_map(const Rows<bf16>& x, int64_t B, int64_t H, int64_t N, int64_t D);
/// The same for blocks of `tokens` neighbouring rows of `heads` neighbouring heads, 64 in all at
/// most, the heads of a row one after the other; coordinates are column, head, row, batch.
CUtensorMap packed_map(const Rows<bf16>& x, int64_t B, int64_t H, int64_t N, int64_t D, int heads,
                       int tokens);

#ifdef __CUDACC__

// Barriers. A phase ends when all arrivals and all bytes expected have come. Waiting for the phase
// of parity 1 of a new barrier returns at once.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// After inits, before the threads meet.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Whether the phase of a parity has ended.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}
/// For long waits: else a thread asks every dozen clocks, and takes these from others.
__device__ __forceinline__ void barrier_wait_asleep(uint32_t barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) __nanosleep(200);
}

/// An arrival, which the barrier's count includes, once this thread's copy_async() so far are done.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// What this thread wrote to shared memory, and what it read there, comes before what the copy
/// engine and products do after the threads have met.
__device__ __forceinline__ void show_to_engines() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Whether this thread is the one of its warp that is chosen, when all its lanes are here. Of a
/// comparison with a lane's number the compiler does not know that it holds for one thread only,
/// and puts a loop over threads around each copy.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(is));
  return is != 0;
}

// Copies to shared memory; their bytes arrive at a barrier.
__device__ __forceinline__ void copy_panel(uint32_t to, const CUtensorMap& map, uint32_t barrier,
                                           int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
/// Has the second-level cache read a panel that will be copied.
__device__ __forceinline__ void prefetch_panel(const CUtensorMap& map, int column, int row,
                                               int head, int batch) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map),
      "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
/// A multiple of 16 bytes, as is each address.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies from shared memory, in groups as a thread commits them.
__device__ __forceinline__ void store_panel(const CUtensorMap& map, uint32_t from, int column,
                                            int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(from), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
/// A multiple of 16 bytes, as is each address.
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
/// The same, added to what is there.
__device__ __forceinline__ void add_bytes(float* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until all of this thread's have read shared memory, which may then be written again.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/// Until they are done.
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// The warpgroup meets, at a barrier of its own: not 0, the block's.
__device__ __forceinline__ void warpgroup_sync(int barrier) {
  asm volatile("barrier.cta.sync %0, 128;" ::"r"(barrier) : "memory");
}
/// Whether x holds for any of its threads.
__device__ __forceinline__ bool warpgroup_any(int barrier, bool x) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "barrier.cta.red.or.pred q, %1, 128, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}"
      : "=r"(any)
      : "r"(barrier), "r"(static_cast<uint32_t>(x))
      : "memory");
  return any != 0;
}

// Clusters: blocks that run at the same time and reach each other's shared memory.
/// The cluster's meeting in two parts, with no word of what threads wrote before: a block must have
/// begun, and be done with what others are to write, before they reach into it.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}
/// Writes 8 or 16 bytes to where the block of a rank has what this one has at `to`; they arrive at
/// its barrier likewise. It takes no fence: who waits for the barrier sees them.
__device__ __forceinline__ void send(float2* to, float2 x, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there, at;\n"
      "mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 at, %1, %4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%2, %3}, [at];\n"
      "}" ::"r"(shared_address(to)),
      "r"(barrier), "f"(x.x), "f"(x.y), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void send(float4* to, const float4& x, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there, at;\n"
      "mapa.shared::cluster.u32 there, %0, %6;\n"
      "mapa.shared::cluster.u32 at, %1, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, "
      "%5}, "
      "[at];\n"
      "}" ::"r"(shared_address(to)),
      "r"(barrier), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(rank)
      : "memory");
}

/// Sets this warpgroup's registers per thread, which the kernel's launch bounds must allow for.
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Products run beside the program: fence (registers are ready), products, commit; once wait<n> has
// returned, at most the last n groups still run. Until then their registers are not to be touched.
__device__ __forceinline__ void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int groups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}
/// Keeps the compiler from moving reads and writes of accumulators across this place.
template <int n>
__device__ __forceinline__ void pin(float (&c)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
  }
}

/// A block in shared memory as an operand. Descriptors hold address, two strides (in 16 bytes) and
/// the swizzle of 128 bytes.
struct Block {
  uint32_t address;

  /// Left or right operand of a b^T, columns [16 step, 16 step + 16): its groups of 8 rows are 1024
  /// bytes apart.
  __device__ uint64_t rows(int step) const {
    return descriptor(16, step / 4 * panel_bytes + step % 4 * 32);
  }
  /// Right operand of a b, rows [16 step, 16 step + 16): its panels are panel_bytes apart.
  __device__ uint64_t columns(int step) const { return descriptor(panel_bytes, step * 2048); }
  /// A warp's 16 rows from `row` on, columns [16 step, 16 step + 16), as a left operand.
  __device__ void left(Fragment& to, int row, int step, uint32_t thread = threadIdx.x) const {
    const uint32_t lane = thread % 32, r = row + lane % 16;
    const uint32_t chunk = (step % 4 * 2 + lane / 16) ^ r % 8;
    load_matrices(to, address + step / 4 * panel_bytes + r * 128 + chunk * 16);
  }

 private:
  /// At a multiple of 16 bytes, in the lower half, so that a step adds a constant to it.
  __device__ uint64_t descriptor(uint32_t leading, uint32_t offset) const {
    const uint32_t low = (address / 16 | leading / 16 << 16) + offset / 16;
    return uint64_t{1u << 30 | 1024 / 16} << 32 | low;
  }
};

#define ENTRAIN_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ENTRAIN_SUMS_8(j)                                                         \
  ENTRAIN_SUMS(j), ENTRAIN_SUMS(j + 1), ENTRAIN_SUMS(j + 2), ENTRAIN_SUMS(j + 3), \
      ENTRAIN_SUMS(j + 4), ENTRAIN_SUMS(j + 5), ENTRAIN_SUMS(j + 6), ENTRAIN_SUMS(j + 7)

/// c (+)= a b, 64 x 64, 16 deep; a from registers. columns: b is a Block's columns(), else rows().
template <bool columns>
__device__ __forceinline__ void product(float (&c)[8][4], const Fragment& a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
      "}"
      : ENTRAIN_SUMS_8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(static_cast<int>(columns)));
}
/// c (+)= a b^T, 64 x 64, 16 deep, of f16: a from registers, b a Block's rows().
__device__ __forceinline__ void product_f16(float (&c)[8][4], const Fragment& a, uint64_t b,
                                            bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
      "}"
      : ENTRAIN_SUMS_8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
/// As the first, with 128 columns.
template <bool columns>
__device__ __forceinline__ void product(float (&c)[16][4], const Fragment& a, uint64_t b,
                                        bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n"
      "}"
      : ENTRAIN_SUMS_8(0), ENTRAIN_SUMS_8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(static_cast<int>(columns)));
}
/// c (+)= a b^T, 64 x 64, 16 deep; both from shared memory.
__device__ __forceinline__ void product(float (&c)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n"
      "}"
      : ENTRAIN_SUMS_8(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
/// c (+)= a b, 64 x 64, 16 deep; both from shared memory, b as a Block's columns(), a as another's
/// rows(), or where a_columns, a^T, as columns() of one panel.
template <bool a_columns>
__device__ __forceinline__ void product_with_columns(float (&c)[8][4], uint64_t a, uint64_t b,
                                                     bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, %35, 1;\n"
      "}"
      : ENTRAIN_SUMS_8(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(a_columns)));
}
/// The same with 128 columns.
template <bool a_columns>
__device__ __forceinline__ void product_with_columns(float (&c)[16][4], uint64_t a, uint64_t b,
                                                     bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %67, 1;\n"
      "}"
      : ENTRAIN_SUMS_8(0), ENTRAIN_SUMS_8(8)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(a_columns)));
}

#undef ENTRAIN_SUMS_8
#undef ENTRAIN_SUMS

#endif  // __CUDACC__

}  // namespace entrain::cuda
