// The way back through DashAttention's router on Hopper: its kernels one after the other, of which
// the last, here, adds up what thread blocks have of dkbar. It reads the sums of chunks that any of
// a block's queries routes to: for B 1, Hq 32, Hkv 2, D 128, N 16384, chunks of 64 up to 52 MB,
// 17 us. An H100 takes 29.
#include <cmath>

#include "kernels/cuda/dash_bf16.cuh"
#include "kernels/cuda/route_hopper_backward.cuh"

namespace entrain::cuda {
namespace {

/// dkbar = scale times the parts' sums, in order; 0 where nobody routes. A thread block takes 64
/// elements, four threads each with a quarter of the parts.
constexpr int summed_elements = 64, quarters = 4;

__global__ void __launch_bounds__(summed_elements* quarters)
    sum_parts(const __grid_constant__ HopperRouteBackward p, double* dkbar) {
  __shared__ double sums[quarters][summed_elements];
  const int column = static_cast<int>(threadIdx.x) % summed_elements;
  const int quarter = static_cast<int>(threadIdx.x) / summed_elements;
  const int64_t x = int64_t{blockIdx.x} * summed_elements + column;  // D is a multiple of 64
  const int64_t row = x / p.route.D, step = p.elements_of_head();
  const int head = static_cast<int>(row / p.route.M), c = static_cast<int>(row % p.route.M);
  const float* from = p.sums + p.part_of(head, 0) * step + x % step;
  const uint64_t* summed = p.summed + p.part_of(head, 0) * p.tiles + c / 64;
  const int share = (p.parts + quarters - 1) / quarters;
  double sum = 0;
#pragma unroll 16
  for (int part = quarter * share; part < min((quarter + 1) * share, p.parts); ++part) {
    sum += summed[part * p.tiles] >> c % 64 & 1 ? from[part * step] : 0;
  }
  sums[quarter][column] = sum;
  __syncthreads();
  if (quarter > 0) return;
  for (int i = 1; i < quarters; ++i) sum += sums[i][column];
  dkbar[x] = p.route.alpha_gamma[1] / sqrt(static_cast<double>(p.route.D)) * sum;
}

/// Sizes, and how sums over rows are cut: into as many parts as thread blocks of an H100 take at
/// once, on any GPU, so that sums do not depend on it. Two runs a part, as late queries have more
/// candidates.
HopperRouteBackward backward_sizes(const Shape& q, const Shape& kbar) {
  const int64_t heads = kbar[0] * kbar[1], queries = block_rows / (q[1] / kbar[1]);
  const int64_t row_tiles = ceil_div(q[2], queries), blocks = 132 * (q[3] == 64 ? 4 : 3);
  const int64_t run = ceil_div(row_tiles, 2 * ceil_div(blocks, heads));
  const auto whole = [](int64_t n) { return static_cast<int>(n); };
  return {whole(heads), whole(ceil_div(kbar[2], 64)), whole(row_tiles), whole(run),
          whole(ceil_div(row_tiles, 2 * run))};
}

/// Where the parts of scratch begin, in bytes, the summaries at 0.
struct BackwardScratch {
  int64_t unions, summed, sums, bytes;

  BackwardScratch(const HopperRouteBackward& p, const Shape& kbar) {
    const int64_t parts = int64_t{p.heads} * p.parts;
    unions = Summaries::scratch(kbar) * int64_t{sizeof(double)};
    summed = unions + 8 * int64_t{p.heads} * p.row_tiles * p.tiles;
    sums = ceil_div(summed + 8 * parts * p.tiles, 16) * 16;
    bytes = sums + 4 * parts * kbar[2] * kbar[3];
  }
};

}  // namespace

int64_t hopper_route_backward_scratch(const Shape& q, const Shape& kbar) {
  const int64_t D = q[3], g = kbar[1] > 0 ? q[1] / kbar[1] : 0;
  const bool fits = (D == 64 || D == 128) && g >= 1 && g <= block_rows && kbar.numel() > 0;
  if (!fits || !on_hopper()) return 0;
  return BackwardScratch(backward_sizes(q, kbar), kbar).bytes / int64_t{sizeof(double)};
}

bool route_backward_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                           const Tensor& tau, const BlockSet& blocks, const Tensor& dbias,
                           const Tensor& dq_sum, const Tensor& dkbar, const Tensor& scratch) {
  if (!hopper_route_takes(q, kbar, routing) || !hopper_route_takes(dq_sum, kbar, routing)) {
    return false;
  }
  HopperRouteBackward p = backward_sizes(q.shape, kbar.shape);
  const BackwardScratch at(p, kbar.shape);
  char* memory = reinterpret_cast<char*>(pointer<double>(scratch));
  p.route = hopper_route_problem(q, kbar, routing, 0);
  p.summaries = pointer<bf16>(prepare_summaries(kbar, scratch).high);
  p.tau = pointer<double>(tau);
  p.mask = pointer<uint64_t>(blocks.mask);
  p.words = static_cast<int>(blocks.mask[3]);
  p.bias = pointer<float>(blocks.bias);
  p.dbias = pointer<float>(dbias);
  p.unions = reinterpret_cast<uint64_t*>(memory + at.unions);
  p.summed = reinterpret_cast<uint64_t*>(memory + at.summed);
  p.sums = reinterpret_cast<float*>(memory + at.sums);
  hopper_route_dw(p);
  hopper_route_gradients(p, Rows<bf16>(q), Rows<bf16>(dq_sum));
  const int64_t total = int64_t{p.heads} * p.route.M * p.route.D;
  launch("route_backward: sums", sum_parts, total / summed_elements, summed_elements * quarters, 0,
         p, pointer<double>(dkbar));
  return true;
}

}  // namespace entrain::cuda
