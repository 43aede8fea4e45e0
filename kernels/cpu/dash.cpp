// DashAttention's router (arXiv 2605.18753): chunk summaries, entmax over them, the prior it puts
// on blocks, and the way back. Scores are 1 / chunk of full attention's; everything here is double
// (see entmax.h) and still a few percent of the step.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/entmax.h"
#include "kernels/cpu/score_tile.h"

namespace entrain {
namespace {

/// a_t = softmax_t(s . k_t / sqrt(D)) over a chunk's tokens; without s they weigh the same.
template <class T>
void summary_weights(const T* k, int64_t step, const T* s, int64_t chunk, int64_t D, double* a) {
  if (!s) {
    std::fill_n(a, chunk, 1 / static_cast<double>(chunk));
    return;
  }
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  double top = -INFINITY;
  for (int64_t t = 0; t < chunk; ++t) {
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) dot += static_cast<double>(s[d]) * k[t * step + d];
    a[t] = dot * scale;
    top = std::max(top, a[t]);
  }
  double sum = 0;
  for (int64_t t = 0; t < chunk; ++t) sum += a[t] = std::exp(a[t] - top);
  for (int64_t t = 0; t < chunk; ++t) a[t] /= sum;
}

/// The chunks a query in chunk `own` routes over: [begin, end), all complete, none forced.
struct Candidates {
  int64_t begin, end;

  Candidates(const DashRouting& routing, int64_t own)
      : begin(routing.init_blocks),
        end(std::max(begin, std::min(own, own - routing.local_blocks + 1))) {}
  int64_t count() const { return end - begin; }
};

/// p = softmax(z) of a row.
void softmax_row(const double* z, int64_t n, double* p) {
  double top = -INFINITY, sum = 0;
  for (int64_t c = 0; c < n; ++c) top = std::max(top, z[c]);
  for (int64_t c = 0; c < n; ++c) sum += p[c] = std::exp(z[c] - top);
  for (int64_t c = 0; c < n; ++c) p[c] /= sum;
}

double entropy_of(const double* p, int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) sum -= p[c] > 0 ? p[c] * std::log(p[c]) : 0;
  return sum;
}

/// One tile of queries of one kv head: scores, entmax and the group's weights.
class RoutedTile : public ScoreTile {
 public:
  void reserve(const AttentionShape& s, int64_t chunks) {
    ScoreTile::reserve(s, chunks);
    grow(p, s.g * chunks);
    for (std::vector<double>* row : {&w, &kept, &dw, &mixed}) grow(*row, chunks);
    grow(support, chunks);
    grow(tau, s.g);
    grow(dq, s.tile() * s.g * s.D);
  }

  /// Scores of queries [first, first + count): gamma z, or z where softmax comes first. token: the
  /// one that query `first` is.
  template <class T>
  void load(const HeadView<T>& q, const HeadView<double>& kbar, const AttentionShape& s,
            const DashRouting& routing, int64_t b, int64_t r, int64_t first, int64_t count,
            int64_t token) {
    g = s.g;
    const Candidates last(routing, (token + count - 1) / routing.chunk);
    scale = (routing.aggregation == Aggregation::entmax ? routing.gamma() : 1) /
            std::sqrt(static_cast<double>(s.D));
    ScoreTile::load(q, kbar, last.count() > 0 ? last.end : 0, scale, s, b, r, first, count);
  }

  double* scores(int64_t query, int64_t head, Candidates range) {
    return z.data() + (query * g + head) * step + range.begin;
  }
  double* head(int64_t h, Candidates range) { return p.data() + h * width + range.begin; }

  /// The thresholds tau of one query: of each head, or of all heads mixed.
  void find_thresholds(const DashRouting& routing, int64_t query, Candidates range) {
    std::fill_n(tau.begin(), g, 0.0);
    if (range.count() == 0) return;
    if (routing.aggregation == Aggregation::softmax) {
      mix(routing, query, range);
      std::fill_n(tau.begin(), g,
                  entmax_threshold(mixed.data(), range.count(), routing.alpha(), kept.data()));
      return;
    }
    for (int64_t h = 0; h < g; ++h) {
      tau[h] =
          entmax_threshold(scores(query, h, range), range.count(), routing.alpha(), kept.data());
    }
  }

  /// The routing weights w of one query from its scores and thresholds.
  void weigh(const DashRouting& routing, int64_t query, Candidates range) {
    std::fill_n(w.begin(), width, 0.0);
    if (range.count() == 0) return;
    if (routing.aggregation == Aggregation::softmax) {
      mix(routing, query, range);
      entmax_probabilities(mixed.data(), range.count(), tau[0], routing.alpha(),
                           w.data() + range.begin);
      return;
    }
    for (int64_t h = 0; h < g; ++h) {
      entmax_probabilities(scores(query, h, range), range.count(), tau[h], routing.alpha(),
                           head(h, range));
      for (int64_t c = range.begin; c < range.end; ++c) w[c] += p[h * width + c];
    }
    for (int64_t c = range.begin; c < range.end; ++c) w[c] /= static_cast<double>(g);
  }

  /// From dw to the gradients of one query's scores, which take the scores' place.
  void weigh_backward(const DashRouting& routing, int64_t query, Candidates range) {
    const int64_t n = range.count();
    for (int64_t h = 0; h < g; ++h) {  // 0 where a head routes over nothing
      double* row = z.data() + (query * g + h) * step;
      std::fill(row, row + std::min(range.begin, width), 0.0);
      std::fill(row + std::min(range.end, width), row + width, 0.0);
    }
    if (n == 0) return;
    double* dw_row = dw.data() + range.begin;
    if (routing.aggregation == Aggregation::softmax) {
      entmax_row_backward(w.data() + range.begin, dw_row, n, routing.alpha(), mixed.data());
      for (int64_t h = 0; h < g; ++h) {
        const double share = routing.gamma() / static_cast<double>(g);
        const double* soft = head(h, range);
        double dot = 0;
        for (int64_t c = 0; c < n; ++c) dot += soft[c] * mixed[c];
        double* dz = scores(query, h, range);
        for (int64_t c = 0; c < n; ++c) dz[c] = share * soft[c] * (mixed[c] - dot);
      }
      return;
    }
    for (int64_t c = 0; c < n; ++c) dw_row[c] /= static_cast<double>(g);
    for (int64_t h = 0; h < g; ++h) {
      entmax_row_backward(head(h, range), dw_row, n, routing.alpha(), scores(query, h, range));
    }
  }

  int64_t g = 1;
  double scale = 1;              // of the queries that ScoreTile holds
  std::vector<double> p;         // [g, width] entmax, or softmax, of one query's heads
  std::vector<double> w;         // [width]
  std::vector<double> mixed;     // [candidates] gamma mean of softmax
  std::vector<double> kept;      // [width] scratch of a row
  std::vector<int64_t> support;  // [width] chunks with w > 0 of one query
  std::vector<double> tau;       // [g]
  std::vector<double> dw, dq;

 private:
  /// p = softmax of each head, mixed = gamma times their mean.
  void mix(const DashRouting& routing, int64_t query, Candidates range) {
    const int64_t n = range.count();
    const double share = routing.gamma() / static_cast<double>(g);
    std::fill_n(mixed.begin(), n, 0.0);
    for (int64_t h = 0; h < g; ++h) {
      softmax_row(scores(query, h, range), n, head(h, range));
      for (int64_t c = 0; c < n; ++c) mixed[c] += share * head(h, range)[c];
    }
  }
};

thread_local RoutedTile tile_of_thread;
thread_local std::vector<double> chunk_of_thread;

}  // namespace

template <>
void Kernels<Device::cpu>::dash_summaries(Tensor k, Tensor s, int64_t chunk, Tensor kbar) const {
  by_type(k, [&]<class T>(T) {
    const HeadView<T> kv(k);
    const HeadView<double> means(kbar);
    const int64_t B = k[0], H = k[1], N = k[2], D = k[3], M = kbar[2];
#pragma omp parallel
    RoutedTile::grow(chunk_of_thread, std::min(chunk, N));
#pragma omp parallel for collapse(3) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t r = 0; r < H; ++r) {
        for (int64_t c = 0; c < M; ++c) {
          double* out = means.at(b, r, c);
          std::fill_n(out, D, 0.0);
          if ((c + 1) * chunk > N) continue;  // a trailing partial chunk has no summary
          double* a = chunk_of_thread.data();
          const T* keys = kv.at(b, r, c * chunk);
          summary_weights(keys, kv.token_step, s ? s.ptr<T>() + r * D : nullptr, chunk, D, a);
          for (int64_t t = 0; t < chunk; ++t) {
            for (int64_t d = 0; d < D; ++d) out[d] += a[t] * keys[t * kv.token_step + d];
          }
        }
      }
    }
  });
}

// With e_t = dkbar . k_t: dk_t += a_t dkbar + a_t (e_t - mean) s / sqrt(D),
// ds += sum_t a_t (e_t - mean) k_t / sqrt(D), mean = sum_u a_u e_u.
template <>
void Kernels<Device::cpu>::dash_summaries_backward(Tensor k, Tensor s, int64_t chunk, Tensor dkbar,
                                                   Tensor dk_sum, Tensor ds_sum) const {
  by_type(k, [&]<class T>(T) {
    const HeadView<T> kv(k), dkv(dk_sum);
    const int64_t B = k[0], H = k[1], N = k[2], D = k[3], M = dkbar[2];
    const double scale = 1 / std::sqrt(static_cast<double>(D));
#pragma omp parallel
    RoutedTile::grow(chunk_of_thread, 2 * std::min(chunk, N) + D);
#pragma omp parallel for schedule(dynamic)
    for (int64_t r = 0; r < H; ++r) {  // one thread a head: ds is summed in order
      std::vector<double>& buffer = chunk_of_thread;
      double* a = buffer.data();
      double* e = a + std::min(chunk, N);
      double* ds = e + std::min(chunk, N);
      std::fill_n(ds, D, 0.0);
      const T* query = s ? s.ptr<T>() + r * D : nullptr;
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t c = 0; (c + 1) * chunk <= N; ++c) {
          const T* keys = kv.at(b, r, c * chunk);
          const double* dout = dkbar.ptr<double>() + ((b * H + r) * M + c) * D;
          summary_weights(keys, kv.token_step, query, chunk, D, a);
          double mean = 0;
          for (int64_t t = 0; t < chunk; ++t) {
            e[t] = 0;
            for (int64_t d = 0; d < D; ++d) e[t] += dout[d] * keys[t * kv.token_step + d];
            mean += a[t] * e[t];
          }
          for (int64_t t = 0; t < chunk; ++t) {
            const double dscore = a[t] * (e[t] - mean) * scale;
            T* dk = dkv.at(b, r, c * chunk + t);
            for (int64_t d = 0; d < D; ++d) {
              dk[d] += static_cast<T>(a[t] * dout[d]);
            }
            for (int64_t d = 0; query && d < D; ++d) {
              dk[d] += static_cast<T>(dscore * query[d]);
              ds[d] += dscore * keys[t * kv.token_step + d];
            }
          }
        }
      }
      T* out = query ? ds_sum.ptr<T>() + r * D : nullptr;
      for (int64_t d = 0; out && d < D; ++d) out[d] += static_cast<T>(ds[d]);
    }
  });
}

template <>
int64_t Kernels<Device::cpu>::dash_route_scratch(const Shape&, const Shape&) {
  return 0;
}

template <>
void Kernels<Device::cpu>::dash_route(Tensor q, Tensor kbar, const DashRouting& routing, Tensor tau,
                                      const BlockSet& blocks, Tensor weights, Tensor, Tensor read,
                                      bool) const {
  by_type(q, [&]<class T>(T) {
    const AttentionShape s(q.shape, {q[0], kbar[1], q[2], q[3]});
    const HeadView<T> qv(q);
    const HeadView<double> means(kbar);
    const int64_t M = kbar[2], words = blocks.mask[3];
#pragma omp parallel
    tile_of_thread.reserve(s, M);
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int64_t backwards = s.tiles() - 1; backwards >= 0; --backwards) {
      for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t r = 0; r < s.Hkv; ++r) {
          RoutedTile& tile = tile_of_thread;
          const int64_t first = backwards * s.tile(), count = std::min(s.tile(), s.N - first);
          const int64_t token = blocks.first + first;
          tile.load(qv, means, s, routing, b, r, first, count, token);
          double entries = 0;

          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (b * s.Hkv + r) * s.N + first + i, own = (token + i) / routing.chunk;
            const Candidates range(routing, own);
            tile.find_thresholds(routing, i, range);
            for (int64_t h = 0; h < s.g; ++h) {
              tau.ptr<double>()[(b * s.Hq + r * s.g + h) * s.N + first + i] = tile.tau[h];
            }
            tile.weigh(routing, i, range);

            uint64_t* mask = blocks.mask.ptr<uint64_t>() + at * words;
            T* bias = blocks.bias.ptr<T>() + at * M;
            std::fill_n(mask, words, 0);
            std::fill_n(bias, M, T{0});
            int64_t support = 0;  // its chunks, then log(w + eps) of each
            for (int64_t c = range.begin; c < range.end; ++c) {
              tile.support[static_cast<size_t>(support)] = c;
              support += tile.w[c] > 0 ? 1 : 0;
            }
            double mu = 0;
            for (int64_t x = 0; x < support; ++x) {
              const int64_t c = tile.support[static_cast<size_t>(x)];
              tile.kept[x] = std::log(tile.w[c] + routing.prior_eps);
              mu += tile.kept[x];
            }
            mu = routing.center && support > 0 ? mu / static_cast<double>(support) : 0;
            for (int64_t x = 0; x < support; ++x) {
              const int64_t c = tile.support[static_cast<size_t>(x)];
              mask[c / 64] |= uint64_t{1} << (c % 64);
              bias[c] = static_cast<T>((tile.kept[x] - mu) / routing.sigma);
            }
            for (int64_t c = 0; c <= own; ++c) {
              if (c < routing.init_blocks || c > own - routing.local_blocks) {
                mask[c / 64] |= uint64_t{1} << (c % 64);
              }
            }
            entries += static_cast<double>(range.count());
            if (!weights) continue;
            T* w = weights.ptr<T>() + at * M;
            std::fill_n(w, M, T{0});
            for (int64_t c = range.begin; c < range.end; ++c) w[c] = static_cast<T>(tile.w[c]);
          }
          if (read) {
            double* fields = read.ptr<double>() + r * read_fields;
#pragma omp atomic
            fields[read_router] += entries;
#pragma omp atomic
            fields[read_flops] += (2 + 4) * entries * static_cast<double>(s.g * s.D);
          }
        }
      }
    }
  });
}

template <>
int64_t Kernels<Device::cpu>::dash_route_backward_scratch(const Shape& q, const Shape& kbar) {
  const AttentionShape s(q, {q[0], kbar[1], q[2], q[3]});
  return kbar.numel() * s.parts();
}

// dl_c = (D_c - mean D) / sigma on the support, dw_c = dl_c / (w_c + eps), then the backward of the
// weights, then the two products with kbar and q.
template <>
void Kernels<Device::cpu>::dash_route_backward(Tensor q, Tensor kbar, const DashRouting& routing,
                                               Tensor tau, const BlockSet&, Tensor dbias,
                                               Tensor dq_sum, Tensor dkbar, Tensor scratch) const {
  by_type(q, [&]<class T>(T) {
    const AttentionShape s(q.shape, {q[0], kbar[1], q[2], q[3]});
    const HeadView<T> qv(q), dqv(dq_sum);
    const HeadView<double> means(kbar);
    const int64_t M = kbar[2], parts = s.parts(), per_head = M * s.D;
    double* sums = scratch.ptr<double>();  // [B, Hkv, parts, M, D]
#pragma omp parallel
    tile_of_thread.reserve(s, M);
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t r = 0; r < s.Hkv; ++r) {
        for (int64_t part = 0; part < parts; ++part) {
          double* dk_part = sums + ((b * s.Hkv + r) * parts + part) * per_head;
          std::fill_n(dk_part, per_head, 0.0);
          RoutedTile& tile = tile_of_thread;
          for (int64_t t = part; t < s.tiles(); t += parts) {
            const int64_t first = t * s.tile(), count = std::min(s.tile(), s.N - first);
            const int64_t rows = count * s.g;
            tile.load(qv, means, s, routing, b, r, first, count, first);
            const int64_t width = tile.width, step = tile.step;
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = (b * s.Hkv + r) * s.N + first + i;
              const Candidates range(routing, (first + i) / routing.chunk);
              for (int64_t h = 0; h < s.g; ++h) {
                tile.tau[h] = tau.ptr<double>()[(b * s.Hq + r * s.g + h) * s.N + first + i];
              }
              tile.weigh(routing, i, range);
              const T* block_sums = dbias.ptr<T>() + at * M;
              double mean = 0, support = 0;  // block_sums is 0 off the support
#pragma omp simd reduction(+ : mean, support)
              for (int64_t c = range.begin; c < range.end; ++c) {
                mean += block_sums[c];
                support += tile.w[c] > 0 ? 1.0 : 0.0;
              }
              mean = routing.center && support > 0 ? mean / support : 0;
#pragma omp simd
              for (int64_t c = range.begin; c < range.end; ++c) {
                const double w = tile.w[c] > 0 ? tile.w[c] + routing.prior_eps : 1.0;
                tile.dw[c] = tile.w[c] > 0 ? (block_sums[c] - mean) / (routing.sigma * w) : 0.0;
              }
              tile.weigh_backward(routing, i, range);
            }
            // queries carry the scale already
            tile::gemm(width, s.D, rows, tile.z.data(), int64_t{1}, step, tile.queries.data(), s.D,
                       dk_part, s.D, true);
            tile::gemm(rows, s.D, width, tile.z.data(), step, int64_t{1}, means.at(b, r, 0), s.D,
                       tile.dq.data(), s.D);
            for (int64_t i = 0; i < rows; ++i) {
              T* dq = dqv.at(b, r * s.g + i % s.g, first + i / s.g);
              for (int64_t d = 0; d < s.D; ++d) {
                dq[d] += static_cast<T>(tile.scale * tile.dq[i * s.D + d]);
              }
            }
          }
        }
      }
    }
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t head = 0; head < s.B * s.Hkv; ++head) {
      for (int64_t i = 0; i < per_head; ++i) {
        const double* part = sums + head * parts * per_head + i;
        double sum = part[0];
        for (int64_t p = 1; p < parts; ++p) sum += part[p * per_head];
        dkbar.ptr<double>()[head * per_head + i] = sum;
      }
    }
  });
}

// A task is a stretch of positions, for which it goes over the whole batch: sums are in order.
template <>
void Kernels<Device::cpu>::dash_entropy(Tensor q, Tensor kbar, const DashRouting& routing,
                                        Tensor tau, Tensor entropy) const {
  by_type(q, [&]<class T>(T) {
    const AttentionShape s(q.shape, {q[0], kbar[1], q[2], q[3]});
    const HeadView<T> qv(q);
    const HeadView<double> means(kbar);
    const int64_t M = kbar[2];
    const double sharpen = routing.aggregation == Aggregation::softmax ? routing.gamma() : 1;
#pragma omp parallel
    tile_of_thread.reserve(s, M);
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < s.tiles(); ++t) {
      RoutedTile& tile = tile_of_thread;
      const int64_t first = t * s.tile(), count = std::min(s.tile(), s.N - first);
      for (int64_t head = 0; head < s.B * s.Hkv; ++head) {
        const int64_t b = head / s.Hkv, r = head % s.Hkv;
        tile.load(qv, means, s, routing, b, r, first, count, first);
        for (int64_t i = 0; i < count; ++i) {
          const Candidates range(routing, (first + i) / routing.chunk);
          const int64_t n = range.count();
          if (n == 0) continue;
          for (int64_t h = 0; h < s.g; ++h) {
            tile.tau[h] = tau.ptr<double>()[(b * s.Hq + r * s.g + h) * s.N + first + i];
          }
          tile.weigh(routing, i, range);
          double* mean = tile.dw.data();
          std::fill_n(mean, n, 0.0);
          for (int64_t h = 0; h < s.g; ++h) {
            double* z = tile.scores(i, h, range);
            for (int64_t c = 0; c < n; ++c) z[c] *= sharpen;
            softmax_row(z, n, tile.kept.data());
            for (int64_t c = 0; c < n; ++c) mean[c] += tile.kept[c] / static_cast<double>(s.g);
          }
          double* fields = entropy.ptr<double>() + (first + i) * entropy_fields;
          fields[entropy_queries] += 1;
          fields[entropy_candidates] += static_cast<double>(n);
          fields[entropy_routing] += entropy_of(tile.w.data() + range.begin, n);
          fields[entropy_softmax] += entropy_of(mean, n);
        }
      }
    }
  });
}

}  // namespace entrain
