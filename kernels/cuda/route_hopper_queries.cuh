#pragma once
// From weights of heads to what the router says of queries: w, mask and bias (see route_hopper.cu).
#include "kernels/cuda/route_hopper.cuh"

namespace entrain::cuda {

struct HopperRouteOutput {
  double* tau;
  uint64_t* mask;
  int words;  // of a row of the mask
  float *bias, *weights;
  double* read;
};

/// What a warpgroup writes of its queries [first, first + count): a warp takes every fourth, and of
/// its query number s, lane s remembers what is known.
class Queries {
 public:
  __device__ Queries(const HopperRoute& p, const HopperRouteOutput& out, const RouteItem& item,
                     int first, int count)
      : p_(p), out_(out), lane_(static_cast<int>(threadIdx.x) % 32) {
    warp_ = static_cast<int>(threadIdx.x) % warpgroup / 32;
    number_ = (count - warp_ + 3) / 4;
    at_ = p.at_query(item, first + warp_);
    const bool is = lane_ < number_;
    own_ = is ? p.own(first + warp_ + 4 * lane_) : 0;
    end_ = is ? p.end(first + warp_ + 4 * lane_) : 0;
    share_ = static_cast<float>(1 / p.routing.sigma);
  }

  /// Tiles without candidates: all but [begin, end).
  __device__ void fill_outside(int begin, int end) const {
    for (int s = 0; s < number_; ++s) {
      const int own = __shfl_sync(0xffffffffu, own_, s);
      zero(s, 0, min(64 * begin, p_.M));
      zero(s, 64 * end, p_.M);
      for (int tile = lane_; tile < out_.words; tile += 32) {
        if (tile < begin || tile >= end) out_.mask[at(s) * out_.words + tile] = forced(own, tile);
      }
    }
  }
  /// Weights, mask and, but for its mean, bias of a tile, of which p is complete.
  __device__ void put_tile(const RowTile& p, int tile) {
    const auto eps = static_cast<float>(p_.routing.prior_eps);
    for (int s = 0; s < number_; ++s) {
      const int own = __shfl_sync(0xffffffffu, own_, s), end = __shfl_sync(0xffffffffu, end_, s);
      const float2 means = p.means(warp_ + 4 * s, p_.g);
      float sum = 0;
      uint64_t support = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 64 * tile + 32 * half + lane_;
        const float w = c >= p_.init() && c < end ? half == 0 ? means.x : means.y : 0;
        const bool routed = w > least_weight;
        const float l = routed ? __logf(w + eps) : 0;
        if (c < p_.M) {
          out_.bias[at(s) * p_.M + c] = l * share_;
          if (out_.weights) out_.weights[at(s) * p_.M + c] = w;
        }
        sum += l;
        support |= uint64_t{__ballot_sync(0xffffffffu, routed)} << 32 * half;
      }
      if (lane_ == 0 && tile < out_.words) {
        out_.mask[at(s) * out_.words + tile] = support | forced(own, tile);
      }
      if (!p_.routing.center || support == 0) continue;
      sum = warp_sum(sum);
      if (lane_ == s) {
        sum_ += sum;
        support_ += __popcll(support);
      }
    }
  }
  /// Takes the mean of the logs over the support from the bias, in tiles [begin, end), eight at a
  /// time, whosever they are. Lanes read again what they wrote, but for the mask.
  __device__ void centre(int begin, int end) const {
    constexpr int batch = 8;
    __syncwarp();
    const float own_mean = support_ > 0 ? sum_ / static_cast<float>(support_) * share_ : 0;
    float* const bias = out_.bias + at_ * p_.M + lane_;
    int s = begin < end ? 0 : number_, tile = begin;
    while (s < number_) {
      int place[batch];
      float old[2 * batch], mean[batch];
      uint32_t routed = 0;  // a bit for each
#pragma unroll
      for (int x = 0; x < batch; ++x) {
        const int last = s < number_ ? __shfl_sync(0xffffffffu, end_, s) : 0;
        mean[x] = __shfl_sync(0xffffffffu, own_mean, s);
        place[x] = 4 * s * p_.M + 64 * tile;
        const uint64_t mask = last > 0 ? out_.mask[at(s) * out_.words + tile] : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = 64 * tile + 32 * half + lane_;
          const bool candidate = c >= p_.init() && c < last;
          if (candidate && (mask >> (32 * half + lane_) & 1) != 0) routed |= 1u << (2 * x + half);
          old[2 * x + half] = candidate ? bias[place[x] + 32 * half] : 0;
        }
        if (++tile == end) {
          tile = begin;
          ++s;
        }
      }
#pragma unroll
      for (int x = 0; x < 2 * batch; ++x) {
        if (routed >> x & 1) bias[place[x / 2] + 32 * (x % 2)] = old[x] - mean[x / 2];
      }
    }
  }

 private:
  __device__ int64_t at(int s) const {
    return at_ + 4 * s;
  }
  /// Bias and weights of chunks [from, to).
  __device__ void zero(int s, int from, int to) const {
    for (int c = from + lane_; c < to; c += 32) {
      out_.bias[at(s) * p_.M + c] = 0;
      if (out_.weights) out_.weights[at(s) * p_.M + c] = 0;
    }
  }
  /// Of a tile, the first init_blocks and the last local_blocks up to a query's own.
  __device__ uint64_t forced(int own, int tile) const {
    const auto before = [tile](int c) {
      const int bits = c - 64 * tile;
      return bits <= 0 ? 0 : bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    };
    const int local = static_cast<int>(p_.routing.local_blocks);
    return before(own + 1) & (before(p_.init()) | ~before(own - local + 1));
  }

  const HopperRoute& p_;
  const HopperRouteOutput& out_;
  const int lane_;
  int warp_, number_;  // of the warp's queries
  int64_t at_;         // its first, in [B, Hkv, N]
  int own_, end_;
  float share_, sum_ = 0;
  int support_ = 0;
};

/// Adds what the router reads for an item, by a warp.
__device__ inline void count_reads(const HopperRoute& p, const RouteItem& item, int queries,
                                   double* read) {
  int entries = 0;  // whole numbers: the order of adding them does not show
  const int end = min(item.first + queries, p.N);
  for (int i = item.first + static_cast<int>(threadIdx.x) % 32; i < end; i += 32) {
    entries += p.end(i) - p.init();
  }
  entries = __reduce_add_sync(0xffffffffu, entries);
  if (threadIdx.x % 32 != 0) return;
  double* fields = read + item.r * read_fields;
  atomicAdd(fields + read_router, static_cast<double>(entries));
  atomicAdd(fields + read_flops, static_cast<double>(int64_t{6} * entries * p.g * p.D));
}

}  // namespace entrain::cuda
