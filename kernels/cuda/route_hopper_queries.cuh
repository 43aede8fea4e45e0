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
    const int tiles = max(out_.words, (p_.M + 63) / 64);
    for (int s = 0; s < number_; ++s) {
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile < begin || tile >= end) put(s, tile, [](int) { return 0.0f; });
      }
    }
  }
  /// Weights, mask and, but for its mean, bias of a tile, of which p is complete.
  __device__ void put_tile(const RowTile& p, int tile) {
    for (int s = 0; s < number_; ++s) {
      const Logs logs =
          put(s, tile, [&](int column) { return p.mean(warp_ + 4 * s, column, p_.g); });
      const float sum = warp_sum(logs.sum);
      if (lane_ == s) {
        sum_ += sum;
        support_ += logs.support;
      }
    }
  }
  /// Takes the mean of the logs over the support from the bias, in tiles [begin, end), four at a
  /// time. Lanes read again what they wrote, but for the mask.
  __device__ void centre(int begin, int end) const {
    __syncwarp();
    for (int s = 0; s < number_; ++s) {
      const int support = __shfl_sync(0xffffffffu, support_, s);
      const float mean = __shfl_sync(0xffffffffu, sum_, s) / static_cast<float>(support) * share_;
      if (support == 0) continue;
      const int last = __shfl_sync(0xffffffffu, end_, s);
      float* bias = out_.bias + at(s) * p_.M;
      const uint64_t* mask = out_.mask + at(s) * out_.words;
      for (int tile = begin; tile < end; tile += 4) {
        float old[8];
        bool routed[8];
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          const int c = 64 * tile + 32 * x + lane_;
          routed[x] = c >= p_.init() && c < last && (mask[c / 64] >> c % 64 & 1) != 0;
          old[x] = c < last ? bias[c] : 0;
        }
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          if (routed[x]) bias[64 * tile + 32 * x + lane_] = old[x] - mean;
        }
      }
    }
  }

 private:
  struct Logs {
    float sum;    // of log(w + eps) of the lane's two chunks
    int support;  // of the tile
  };

  __device__ int64_t at(int s) const {
    return at_ + 4 * s;
  }

  /// weight(column) is w where the chunk is a candidate.
  template <class F>
  __device__ Logs put(int s, int tile, F weight) const {
    const int own = __shfl_sync(0xffffffffu, own_, s), end = __shfl_sync(0xffffffffu, end_, s);
    const int init = p_.init(), local = static_cast<int>(p_.routing.local_blocks);
    const auto eps = static_cast<float>(p_.routing.prior_eps);
    Logs logs = {0, 0};
    uint64_t word = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = 32 * half + lane_, c = 64 * tile + column;
      const float w = c >= init && c < end ? weight(column) : 0;
      const bool routed = w > least_weight;
      const bool forced = c <= own && (c < init || c > own - local);
      const float l = routed ? __logf(w + eps) : 0;
      if (c < p_.M) {
        out_.bias[at(s) * p_.M + c] = l * share_;
        if (out_.weights) out_.weights[at(s) * p_.M + c] = w;
      }
      logs.sum += l;
      logs.support += __popc(__ballot_sync(0xffffffffu, routed));
      word |= uint64_t{__ballot_sync(0xffffffffu, routed || forced)} << 32 * half;
    }
    if (lane_ == 0 && tile < out_.words) out_.mask[at(s) * out_.words + tile] = word;
    return logs;
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
