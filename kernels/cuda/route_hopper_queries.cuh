#pragma once
// From weights of heads to what the router says of queries: w, mask and bias (see route_hopper.cu).
#include "kernels/cuda/route_hopper.cuh"
#include "kernels/cuda/route_hopper_thresholds.cuh"

namespace entrain::cuda {

struct HopperRouteOutput {
  double* tau;
  uint64_t* mask;
  int words;  // of a row of the mask
  float *bias, *weights;
  double* read;
  float share;  // of a log in a bias
};

/// The lists of a warpgroup's rows, and sums over heads, of a window of chunks for each warp.
struct HeadLists {
  static constexpr int tiles = 6;  // of a window
  static constexpr int ends_at = 4 * RowLists::bytes;
  static constexpr int sums_at = ends_at + block_rows * static_cast<int>(sizeof(ListEnd));
  static constexpr int bytes = sums_at + 4 * 64 * tiles * 4;

  char* at;

  /// Of a warp's rows, and of one of the warpgroup's.
  __device__ RowLists rows(int warp) const { return RowLists(at + warp * RowLists::bytes); }
  __device__ float* entries(unsigned row) const { return rows(row / 16).entries(row % 16); }
  __device__ ListEnd& end(int row) const { return reinterpret_cast<ListEnd*>(at + ends_at)[row]; }
  __device__ float* sums(int warp) const {
    return reinterpret_cast<float*>(at + sums_at) + warp * 64 * tiles;
  }
};

/// What a warpgroup writes of its queries [first, first + count): a warp takes neighbouring ones,
/// those of its own rows where these are whole queries. Of its query number s, lane s remembers
/// what is known.
class Queries {
 public:
  __device__ Queries(const HopperRoute& p, const HopperRouteOutput& out, const RouteItem& item,
                     int first, int count)
      : p_(p), out_(out), lane_(static_cast<int>(threadIdx.x) % 32) {
    const int each = (p.queries + 3) / 4;
    warp_ = uniform(static_cast<int>(threadIdx.x) % warpgroup / 32);
    begin_ = warp_ * each;
    number_ = max(0, min(count - begin_, each));
    const int64_t at = p.at_query(item, first + begin_);
    mask_ = out.mask + at * out.words;
    bias_ = out.bias + at * p.M;
    weights_ = out.weights ? out.weights + at * p.M : nullptr;
    own_ = p.own(first + begin_ + min(lane_, max(number_ - 1, 0)));
    end_ = p.end_of(own_);
  }

  /// Tiles without candidates: all but [begin, end).
  __device__ void fill_outside(int begin, int end) const {
#pragma unroll 1
    for (int s = 0; s < number_; ++s) {
      const int own = __shfl_sync(0xffffffffu, own_, s);
      zero_outside(bias_ + s * p_.M, 64 * begin, 64 * end);
      if (weights_) zero_outside(weights_ + s * p_.M, 64 * begin, 64 * end);
      uint64_t* const mask = mask_ + s * out_.words;
#pragma unroll 1
      for (int tile = lane_; tile < out_.words; tile += 32) {
        if (tile < begin || tile >= end) mask[tile] = forced(own, tile);
      }
    }
  }
  /// Weights, mask and bias of tiles [begin, end), from the lists of the heads.
  template <Curve curve>
  __device__ void put_lists(const FloatEntmax<curve>& entmax, const HeadLists& lists, int begin,
                            int end) {
    const bool whole = end - begin <= HeadLists::tiles;
    for (int s = 0; s < number_; ++s) {
      for (int from = begin; from < end; from += HeadLists::tiles) {
        const float nan = add_heads(entmax, lists, begin_ + s, 64 * from);
        put_window(lists.sums(warp_), nan, s, from, min(from + HeadLists::tiles, end), whole);
      }
    }
    if (!whole) centre(begin, end);
  }
  /// The thresholds of the heads.
  __device__ void put_thresholds(const HeadLists& lists, const RouteItem& item, int first) const {
    for (int i = begin_; i < begin_ + number_; ++i) {
      for (int h = lane_; h < p_.g; h += 32) {
        out_.tau[p_.at_row(item, first + i, h)] =
            static_cast<double>(lists.end(i * p_.g + h).threshold);
      }
    }
  }
  /// Weights, mask and, but for its mean, bias of a tile, of which p is complete.
  __device__ void put_tile(const RowTile& p, int tile) {
    for (int s = 0; s < number_; ++s) {
      const int own = __shfl_sync(0xffffffffu, own_, s), end = __shfl_sync(0xffffffffu, end_, s);
      const float2 means = p.means(begin_ + s, p_.g);
      float sum = 0;
      uint64_t support = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 64 * tile + 32 * half + lane_;
        const float w = c >= p_.init() && c < end ? half == 0 ? means.x : means.y : 0;
        const bool routed = w > least_weight;
        const float l = routed ? log_of(w) : 0;
        if (c < p_.M) {
          bias_[s * p_.M + c] = l * out_.share;
          if (weights_) weights_[s * p_.M + c] = w;
        }
        sum += l;
        support |= uint64_t{__ballot_sync(0xffffffffu, routed)} << 32 * half;
      }
      if (lane_ == 0 && tile < out_.words) {
        mask_[s * out_.words + tile] = support | forced(own, tile);
      }
      remember(s, sum, __popcll(support));
    }
  }
  /// Takes the mean of the logs over the support from the bias, in tiles [begin, end), four at a
  /// time, where that is asked for. Lanes read again what they wrote, but for the mask.
  __device__ void centre(int begin, int end) const {
    if (!p_.routing.center) return;
    __syncwarp();
    const float own_mean = mean(sum_, support_);
    for (int s = 0; s < number_; ++s) {
      const float mean = __shfl_sync(0xffffffffu, own_mean, s);
      const int last = __shfl_sync(0xffffffffu, end_, s);
      float* const bias = bias_ + s * p_.M;
      const uint64_t* const mask = mask_ + s * out_.words;
      for (int tile = begin; tile < end; tile += 4) {
        float old[8];
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          const int c = 64 * tile + 32 * x + lane_;
          const bool routed = c >= p_.init() && c < last && (mask[c / 64] >> c % 64 & 1) != 0;
          old[x] = routed ? bias[c] : INFINITY;
        }
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          if (old[x] != INFINITY) bias[64 * tile + 32 * x + lane_] = old[x] - mean;
        }
      }
    }
  }

 private:
  __device__ float log_of(float w) const {
    return __logf(w + static_cast<float>(p_.routing.prior_eps));
  }
  __device__ float mean(float sum, int support) const {
    return support > 0 ? sum / static_cast<float>(support) * out_.share : 0;
  }
  /// Adds to the sum of logs over a query's support.
  __device__ void remember(int s, float sum, int support) {
    if (!p_.routing.center || support == 0) return;
    sum = warp_sum(sum);
    if (lane_ == s) {
      sum_ += sum;
      support_ += support;
    }
  }

  /// Two of a list.
  struct Entries {
    float z[2];
    unsigned chunk[2];
  };
  /// Sums p over the heads of the warpgroup's query i, of a window of chunks from c0 on, head after
  /// head: a list has a chunk once. Returns NaN where a head has no threshold, else 0.
  template <Curve curve>
  __device__ float add_heads(const FloatEntmax<curve>& entmax, const HeadLists& lists, int i,
                             int c0) const {
    static_assert(RowLists::capacity <= 128);
    constexpr int window = 64 * HeadLists::tiles;
    float* const sums = lists.sums(warp_);
    __syncwarp();  // all are done with the last
#pragma unroll
    for (int c = 0; c < window; c += 128) {
      *reinterpret_cast<float4*>(sums + c + 4 * lane_) = make_float4(0, 0, 0, 0);
    }
    __syncwarp();
    const auto read = [&](unsigned row, int k) {  // what lies after a list is read, and not used
      float* const list = lists.entries(row) + lane_ + k;
      const uint16_t* const chunks = &RowLists::chunk(list, row / 8 % 2);
      return Entries{{list[0], list[32]}, {chunks[0], chunks[64]}};
    };
    const auto add = [&](const Entries& entries, int k, const ListEnd& end) {
      float x[2], *to[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned column = entries.chunk[half] - c0;
        const bool is = k + 32 * half + lane_ < end.size && column < window;
        x[half] = is ? entmax.probability(entries.z[half], end.threshold) : 0;
        to[half] = sums + column;
      }
      float sum[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[half] = x[half] > 0 ? *to[half] : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (x[half] > 0) *to[half] = __fadd_rn(sum[half], x[half]);  // no fma, as in RowTile
      }
    };
    float nan = 0;
    const unsigned first = i * p_.g, last = first + p_.g - 1;
    ListEnd next_end = lists.end(first);
    Entries next = read(first, 0);  // on its way while the head before is added
#pragma unroll 1
    for (unsigned row = first; row <= last; ++row) {
      const ListEnd end = next_end;
      const Entries entries = next;
      next_end = lists.end(min(row + 1, last));
      next = read(min(row + 1, last), 0);
      add(entries, 0, end);
      if (end.size > 64) add(read(row, 64), 64, end);
      __syncwarp();
      nan += end.threshold - end.threshold;
    }
    return nan;
  }
  /// Of tiles [from, to), a window's: its sums make way for logs.
  __device__ void put_window(float* sums, float nan, int s, int from, int to, bool whole) {
    const int own = __shfl_sync(0xffffffffu, own_, s), end = __shfl_sync(0xffffffffu, end_, s);
    const float part = 1 / static_cast<float>(p_.g);
    float sum = 0;
    uint64_t word = 0;  // of the lane's tile
    int support = 0;
    for (int tile = from; tile < to; ++tile) {
      uint64_t bits = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 64 * tile + 32 * half + lane_;
        float& at_c = sums[c - 64 * from];
        const float w = c >= p_.init() && c < end ? (at_c + nan) * part : 0;
        const bool routed = w > least_weight;
        const float l = routed ? log_of(w) : -INFINITY;
        at_c = l;
        if (routed) sum += l;
        if (weights_ && c < p_.M) weights_[s * p_.M + c] = w;
        bits |= uint64_t{__ballot_sync(0xffffffffu, routed)} << 32 * half;
      }
      support += __popcll(bits);
      if (lane_ == tile - from) word = bits;
    }
    const int tile = from + lane_;
    if (tile < to && tile < out_.words) {
      mask_[s * out_.words + tile] = word | forced(own, tile);
    }
    float subtract = 0;
    if (!whole) {
      remember(s, sum, support);
    } else if (p_.routing.center) {
      subtract = mean(warp_sum(sum), support);
    }
    for (int c = 64 * from + lane_; c < min(64 * to, p_.M); c += 32) {
      const float l = sums[c - 64 * from];
      bias_[s * p_.M + c] = l == -INFINITY ? 0 : l * out_.share - subtract;
    }
  }
  /// What a row has of all chunks but [begin, end).
  __device__ void zero_outside(float* row, int begin, int end) const {
#pragma unroll 1
    for (int c = lane_; c < min(begin, p_.M); c += 32) row[c] = 0;
#pragma unroll 1
    for (int c = end + lane_; c < p_.M; c += 32) row[c] = 0;
  }
  /// Of a tile, the first init_blocks and the last local_blocks up to a query's own.
  __device__ uint64_t forced(int own, int tile) const {
    const int local = static_cast<int>(p_.routing.local_blocks);
    return chunks_before(own + 1, tile) &
           (chunks_before(p_.init(), tile) | ~chunks_before(own - local + 1, tile));
  }

  const HopperRoute& p_;
  const HopperRouteOutput& out_;
  const int lane_;
  int warp_, begin_, number_;  // the warp's queries of the warpgroup's
  uint64_t* mask_;             // of its first
  float *bias_, *weights_;
  int own_, end_;
  float sum_ = 0;
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
