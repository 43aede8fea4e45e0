#pragma once
// What the attention kernels share: plain pointers into [B, H, N, D] views, and the partition of
// work.
#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "kernels/kernels.h"

namespace entrain {

/// Rows of a [B, H, N, D] view whose last stride is 1.
template <class T>
struct HeadView {
  T* data;
  int64_t batch_step, head_step, token_step;

  explicit HeadView(const Tensor& t)
      : data(t.ptr<T>()), batch_step(t.stride[0]), head_step(t.stride[1]), token_step(t.stride[2]) {
    if (t.shape.rank != 4) fail("{} are not rows of heads", t.shape.to_string());
  }
  T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch_step + h * head_step + i * token_step;
  }
};

struct AttentionShape {
  int64_t B, Hq, Hkv, N, D, g, keys;

  /// runs: what keys stand for; first: the token that the first query is.
  AttentionShape(const Shape& q, const Shape& k, Runs runs = {}, int64_t first = 0)
      : B(q[0]),
        Hq(q[1]),
        Hkv(k[1]),
        N(q[2]),
        D(q[3]),
        g(Hkv > 0 ? Hq / Hkv : 0),
        keys(runs.within(first + N)) {
    const bool fit =
        q.rank == 4 && k.rank == 4 && k[0] == B && k[2] == keys && k[3] == D && g * Hkv == Hq;
    // Not require(): the step would write out shapes each time, which allocates.
    if (!fit) fail("attention of queries {} over keys {}", q.to_string(), k.to_string());
  }
  /// Queries handled together: about 512 (query, head) rows, where there are so many.
  int64_t tile() const { return std::min(std::max<int64_t>(1, N), g >= 32 ? 16 : 512 / g); }
  int64_t tiles() const { return (N + tile() - 1) / tile(); }
  /// Tiles of one kv head are dealt to this many tasks, each with its own sums over queries, added
  /// up in order afterwards. It depends on the shape alone, so results do not depend on the
  /// threads.
  int64_t parts() const {
    const int64_t wanted = (16 + B * Hkv - 1) / (B * Hkv);
    return wanted < tiles() ? wanted : tiles();
  }
};

}  // namespace entrain
