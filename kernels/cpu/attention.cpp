// Softmax attention over per-query sets of key blocks: the engine of every method, full attention
// included (an empty mask means every block).
//
// A task is a tile of about 512 (query, head) rows of one kv head. It walks the key blocks; for
// each, the rows whose query attends it are gathered, 64 at a time, and go through S = Q K^T, exp,
// O += P V while the 64 x block tile of S stays in the first-level cache: 4 D operations per
// attended pair forward, 10 D backward, and nothing for pairs that are not attended. Forward is the
// online softmax of FlashAttention (arXiv 2205.14135); backward recomputes P from lse.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/by_type.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/views.h"

namespace entrain {
namespace {

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

/// What queries see of the keys: those complete at their token, of these the last of the window.
class Sight {
 public:
  explicit Sight(const BlockSet& blocks)
      : keys_(blocks.keys), block_(blocks.block), window_(blocks.window) {}

  /// Keys up to a token. The first of them that are seen, and the first block with such.
  int64_t end(int64_t token) const { return keys_.within(token + 1); }
  int64_t begin(int64_t end) const { return window_ > 0 ? std::max<int64_t>(0, end - window_) : 0; }
  int64_t first_block(int64_t token) const { return begin(end(token)) / block_; }

  /// The tokens [first, last) that see something of block c.
  int64_t first_token(int64_t c) const { return keys_.end(c * block_); }
  int64_t last_token(int64_t c) const {
    return window_ > 0 ? keys_.end((c + 1) * block_ + window_ - 1)
                       : std::numeric_limits<int64_t>::max();
  }

 private:
  Runs keys_;
  int64_t block_, window_;
};

/// Queries of a tile that attend one block, as offsets into the tile.
class Picker {
 public:
  Picker(const BlockSet& blocks, const AttentionShape& s)
      : s_(s), sight_(blocks), start_(blocks.first) {
    if (!blocks.mask) return;
    mask_ = blocks.mask.ptr<uint64_t>();
    words_ = blocks.mask[3];
  }

  void pick(int64_t b, int64_t r, int64_t first, int64_t count, int64_t c,
            std::vector<int32_t>& picked) const {
    picked.clear();
    const int64_t token = start_ + first;
    const int64_t begin = std::max<int64_t>(0, sight_.first_token(c) - token);
    const int64_t end = std::min(token + count, sight_.last_token(c)) - token;
    if (!mask_) {
      for (int64_t i = begin; i < end; ++i) picked.push_back(static_cast<int32_t>(i));
      return;
    }
    // Without a branch: which queries attend a block is not to be predicted.
    const uint64_t* word = mask_ + ((b * s_.Hkv + r) * s_.N + first) * words_ + c / 64;
    picked.resize(static_cast<size_t>(std::max<int64_t>(0, end - begin)));
    size_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      picked[n] = static_cast<int32_t>(i);
      n += word[i * words_] >> (c % 64) & 1;
    }
    picked.resize(n);
  }

 private:
  AttentionShape s_;
  Sight sight_;
  int64_t start_;
  const uint64_t* mask_ = nullptr;
  int64_t words_ = 0;
};

/// Every block of x [B, Hkv, N, D], transposed: [B, Hkv, M, D, tokens of the block].
template <class T>
void transpose_blocks(const Tensor& x, int64_t block, T* out) {
  const HeadView<T> view(x);
  const int64_t B = x[0], H = x[1], N = x[2], D = x[3], M = (N + block - 1) / block;
#pragma omp parallel for collapse(3) schedule(static)
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t c = 0; c < M; ++c) {
        const int64_t tokens = std::min(block, N - c * block);
        tile::transpose(tokens, D, view.at(b, h, c * block), view.token_step,
                        out + ((b * H + h) * N + c * block) * D, tokens);
      }
    }
  }
}

/// Copies picked queries' rows (g heads each) from a tile, or points at them where they lie in a
/// row.
template <class T>
const T* gather(const T* tile, const int32_t* picked, int64_t count, int64_t row,
                std::vector<T>& buffer) {
  if (picked[count - 1] - picked[0] == count - 1) return tile + picked[0] * row;
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(tile + picked[i] * row, row, buffer.data() + i * row);
  }
  return buffer.data();
}

/// The g heads of queries [first, first + count) as contiguous rows (query, head), times scale.
template <class T>
void load_tile(const HeadView<T>& x, const AttentionShape& s, int64_t b, int64_t r, int64_t first,
               int64_t count, T scale, T* tile) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t h = 0; h < s.g; ++h, tile += s.D) {
      const T* from = x.at(b, r * s.g + h, first + i);
      for (int64_t d = 0; d < s.D; ++d) tile[d] = from[d] * scale;
    }
  }
}

template <class T>
void store_tile(const T* tile, const AttentionShape& s, int64_t b, int64_t r, int64_t first,
                int64_t count, T scale, bool add, const HeadView<T>& x) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t h = 0; h < s.g; ++h, tile += s.D) {
      T* to = x.at(b, r * s.g + h, first + i);
      for (int64_t d = 0; d < s.D; ++d) to[d] = (add ? to[d] : T{0}) + tile[d] * scale;
    }
  }
}

/// A thread's memory; grows to what the largest shape needs and stays. All threads reserve before
/// the work is dealt out, so that no later step allocates because it is dealt otherwise.
template <class T>
struct Scratch {
  std::vector<int32_t> picked;
  std::vector<int64_t> seen;      // keys up to each query of the tile
  std::vector<T> q, o, dout, dq;  // tiles
  std::vector<T> row_max, row_sum, delta;
  std::vector<T> gathered_q, gathered_o, s, ds, partial, correction;
  std::vector<T> kt;  // a block of keys, transposed

  void reserve(const AttentionShape& shape, int64_t block, int64_t queries, bool backward) {
    const auto tile_rows = static_cast<size_t>(shape.tile() * shape.g);
    const auto rows = static_cast<size_t>(queries * shape.g);
    const auto D = static_cast<size_t>(shape.D), width = static_cast<size_t>(block);
    auto grow = [](auto& v, size_t n) {
      if (v.size() < n) v.resize(n);
    };
    picked.reserve(static_cast<size_t>(shape.tile()));
    grow(seen, static_cast<size_t>(shape.tile()));
    grow(q, tile_rows * D);
    grow(o, tile_rows * D);
    grow(row_max, tile_rows);
    grow(row_sum, tile_rows);
    grow(gathered_q, rows * D);
    grow(s, rows * width);
    grow(partial, rows * D);
    grow(correction, rows);
    grow(kt, width * D);
    if (!backward) return;
    grow(dout, tile_rows * D);
    grow(dq, tile_rows * D);
    grow(delta, tile_rows);
    grow(gathered_o, rows * D);
    grow(ds, rows * width);
  }
};

template <class T>
thread_local Scratch<T> scratch_of_thread;

/// Queries whose rows go through the products together: about 96 rows, a multiple of the
/// micro-kernel's.
int64_t batch_of(const AttentionShape& s) {
  return std::max<int64_t>(1, 96 / s.g);
}

template <class T>
void forward(Tensor q, Tensor k, Tensor v, const BlockSet& blocks, Tensor o, Tensor lse,
             Tensor scratch, Tensor read, bool only_flops) {
  const AttentionShape s(q.shape, k.shape, blocks.keys, blocks.first);
  const HeadView<T> qv(q), kv(k), vv(v), ov(o);
  const int64_t block = blocks.block, M = blocks.bias ? blocks.bias[3] : 0, batch = batch_of(s);
  const T scale = T{1} / std::sqrt(static_cast<T>(s.D));
  const Sight sight(blocks);
  const Picker picker(blocks, s);
  const T* bias = blocks.bias ? blocks.bias.ptr<T>() : nullptr;
  T* log_sums = lse.ptr<T>();
  T* kt = static_cast<T*>(scratch.data);
  if (kt) transpose_blocks(k, block, kt);

#pragma omp parallel
  scratch_of_thread<T>.reserve(s, std::min(block, s.keys), batch, false);
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t backwards = s.tiles() - 1; backwards >= 0; --backwards) {  // longest rows first
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t r = 0; r < s.Hkv; ++r) {
        Scratch<T>& w = scratch_of_thread<T>;
        const int64_t first = backwards * s.tile(), count = std::min(s.tile(), s.N - first);
        const int64_t rows = count * s.g, row = s.g * s.D;
        load_tile<T>(qv, s, b, r, first, count, scale, w.q.data());
        std::fill_n(w.o.begin(), rows * s.D, T{0});
        std::fill_n(w.row_max.begin(), rows, -infinity<T>);
        std::fill_n(w.row_sum.begin(), rows, T{0});
        const int64_t token = blocks.first + first;
        for (int64_t i = 0; i < count; ++i) w.seen[i] = sight.end(token + i);
        double pairs = 0, visits = 0;

        for (int64_t c = sight.first_block(token); c * block < w.seen[count - 1]; ++c) {
          const int64_t width = std::min(block, s.keys - c * block);
          picker.pick(b, r, first, count, c, w.picked);
          if (w.picked.empty()) continue;
          const T* kt_block = w.kt.data();
          if (kt) {
            kt_block = kt + ((b * s.Hkv + r) * s.keys + c * block) * s.D;
          } else {
            tile::transpose(width, s.D, kv.at(b, r, c * block), kv.token_step, w.kt.data(), width);
          }
          visits += static_cast<double>(w.picked.size());
          for (size_t at = 0; at < w.picked.size(); at += static_cast<size_t>(batch)) {
            const int32_t* picked = w.picked.data() + at;
            const auto n = std::min<int64_t>(batch, static_cast<int64_t>(w.picked.size() - at));
            const T* qg = gather(w.q.data(), picked, n, row, w.gathered_q);
            tile::gemm(n * s.g, width, s.D, qg, s.D, int64_t{1}, kt_block, width, w.s.data(),
                       width);
            for (int64_t i = 0; i < n; ++i) {
              const int64_t query = first + picked[i];
              const int64_t seen = w.seen[picked[i]];
              const int64_t begin = std::max<int64_t>(0, sight.begin(seen) - c * block);
              const int64_t end = std::min(width, seen - c * block);
              const T shift = bias ? bias[((b * s.Hkv + r) * s.N + query) * M + c] : T{0};
              pairs += static_cast<double>(end - begin);
              for (int64_t h = 0; h < s.g; ++h) {
                T* p = w.s.data() + (i * s.g + h) * width;
                const int64_t at_row = picked[i] * s.g + h;
                T top = -infinity<T>;
#pragma omp simd reduction(max : top)
                for (int64_t j = begin; j < end; ++j) top = std::max(top, p[j]);
                const T old_max = w.row_max[at_row];
                const T new_max = std::max(old_max, top + shift);
                const T offset = shift - new_max;
                T sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = begin; j < end; ++j) {
                  p[j] = fast_exp(p[j] + offset);
                  sum += p[j];
                }
                std::fill(p, p + begin, T{0});
                std::fill(p + end, p + width, T{0});
                const T correction = fast_exp(old_max - new_max);
                w.correction[i * s.g + h] = correction;
                w.row_sum[at_row] = w.row_sum[at_row] * correction + sum;
                w.row_max[at_row] = new_max;
              }
            }
            tile::gemm(n * s.g, s.D, width, w.s.data(), width, int64_t{1}, vv.at(b, r, c * block),
                       vv.token_step, w.partial.data(), s.D);
            for (int64_t i = 0; i < n * s.g; ++i) {
              T* out = w.o.data() + (picked[i / s.g] * s.g + i % s.g) * s.D;
              const T* add = w.partial.data() + i * s.D;
              const T correction = w.correction[i];
              for (int64_t d = 0; d < s.D; ++d) out[d] = out[d] * correction + add[d];
            }
          }
        }

        for (int64_t i = 0; i < rows; ++i) {
          const T sum = w.row_sum[i];
          const T inverse = sum > 0 ? 1 / sum : sum;  // an empty row gives 0; NaN stays NaN
          for (int64_t d = 0; d < s.D; ++d) w.o[i * s.D + d] *= inverse;
          // +infinity makes the backward pass of an empty row exp(-infinity) = 0.
          log_sums[(b * s.Hq + r * s.g + i % s.g) * s.N + first + i / s.g] =
              sum == 0 ? infinity<T> : w.row_max[i] + std::log(sum);
        }
        store_tile<T>(w.o.data(), s, b, r, first, count, 1, false, ov);
        if (read) {
          double* fields = read.ptr<double>() + r * read_fields;
#pragma omp atomic
          fields[read_flops] += (4 + 8) * pairs * static_cast<double>(s.g * s.D);
          if (only_flops) continue;
#pragma omp atomic
          fields[read_pairs] += pairs;
#pragma omp atomic
          fields[read_blocks] += visits;
#pragma omp atomic
          fields[read_queries] += static_cast<double>(count);
#pragma omp atomic
          fields[read_causal] +=
              static_cast<double>(count) * static_cast<double>(2 * token + count + 1) / 2;
        }
      }
    }
  }
}

template <class T>
void backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor dout, Tensor lse,
              const BlockSet& blocks, Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor scratch,
              bool add_dq) {
  const AttentionShape s(q.shape, k.shape, blocks.keys);
  const HeadView<T> qv(q), kv(k), ov(o), dov(dout), dqv(dq), dkv(dk), dvv(dv);
  const int64_t block = blocks.block, M = (s.keys + block - 1) / block, batch = batch_of(s);
  const int64_t size = k.numel(), per_head = s.keys * s.D, parts = s.parts();
  const T scale = T{1} / std::sqrt(static_cast<T>(s.D));
  const Sight sight(blocks);
  const Picker picker(blocks, s);
  const T* bias = blocks.bias ? blocks.bias.ptr<T>() : nullptr;
  const T* log_sums = lse.ptr<T>();
  T* kt = static_cast<T*>(scratch.data);
  T* vt = kt + size;
  T* sums = vt + size;  // [B, Hkv, parts, 2, keys, D]
  transpose_blocks(k, block, kt);
  transpose_blocks(v, block, vt);

#pragma omp parallel
  scratch_of_thread<T>.reserve(s, std::min(block, s.N), batch, true);
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t r = 0; r < s.Hkv; ++r) {
      for (int64_t part = 0; part < parts; ++part) {
        Scratch<T>& w = scratch_of_thread<T>;
        T* dk_part = sums + ((b * s.Hkv + r) * parts + part) * 2 * per_head;
        T* dv_part = dk_part + per_head;
        std::fill_n(dk_part, 2 * per_head, T{0});

        for (int64_t t = part; t < s.tiles(); t += parts) {
          const int64_t first = t * s.tile(), count = std::min(s.tile(), s.N - first);
          const int64_t rows = count * s.g, row = s.g * s.D;
          load_tile<T>(qv, s, b, r, first, count, scale, w.q.data());
          load_tile<T>(ov, s, b, r, first, count, 1, w.o.data());
          load_tile<T>(dov, s, b, r, first, count, 1, w.dout.data());
          std::fill_n(w.dq.begin(), rows * s.D, T{0});
          for (int64_t i = 0; i < count; ++i) w.seen[i] = sight.end(first + i);
          for (int64_t i = 0; i < rows; ++i) {
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < s.D; ++d) dot += w.o[i * s.D + d] * w.dout[i * s.D + d];
            w.delta[i] = dot;
          }
          T* dbias_tile = dbias ? dbias.ptr<T>() + ((b * s.Hkv + r) * s.N + first) * M : nullptr;
          if (dbias_tile) std::fill_n(dbias_tile, count * M, T{0});

          for (int64_t c = sight.first_block(first); c * block < w.seen[count - 1]; ++c) {
            const int64_t width = std::min(block, s.keys - c * block);
            const int64_t offset = ((b * s.Hkv + r) * s.keys + c * block) * s.D;
            picker.pick(b, r, first, count, c, w.picked);
            for (size_t at = 0; at < w.picked.size(); at += static_cast<size_t>(batch)) {
              const int32_t* picked = w.picked.data() + at;
              const auto n = std::min<int64_t>(batch, static_cast<int64_t>(w.picked.size() - at));
              const int64_t m = n * s.g;
              const T* qg = gather(w.q.data(), picked, n, row, w.gathered_q);
              const T* og = gather(w.dout.data(), picked, n, row, w.gathered_o);
              tile::gemm(m, width, s.D, qg, s.D, int64_t{1}, kt + offset, width, w.s.data(), width);
              tile::gemm(m, width, s.D, og, s.D, int64_t{1}, vt + offset, width, w.ds.data(),
                         width);
              for (int64_t i = 0; i < n; ++i) {
                const int64_t token = first + picked[i];
                const int64_t seen = w.seen[picked[i]];
                const int64_t begin = std::max<int64_t>(0, sight.begin(seen) - c * block);
                const int64_t end = std::min(width, seen - c * block);
                const T shift = bias ? bias[((b * s.Hkv + r) * s.N + token) * M + c] : T{0};
                T block_sum = 0;
                for (int64_t h = 0; h < s.g; ++h) {
                  T* p = w.s.data() + (i * s.g + h) * width;
                  T* ds = w.ds.data() + (i * s.g + h) * width;
                  const T lse_shift = shift - log_sums[(b * s.Hq + r * s.g + h) * s.N + token];
                  const T delta = w.delta[picked[i] * s.g + h];
                  T sum = 0;
#pragma omp simd reduction(+ : sum)
                  for (int64_t j = begin; j < end; ++j) {
                    p[j] = fast_exp(p[j] + lse_shift);
                    ds[j] = p[j] * (ds[j] - delta);
                    sum += ds[j];
                  }
                  for (T* x : {p, ds}) {
                    std::fill(x, x + begin, T{0});
                    std::fill(x + end, x + width, T{0});
                  }
                  block_sum += sum;
                }
                if (dbias_tile) dbias_tile[picked[i] * M + c] = block_sum;
              }
              tile::gemm(width, s.D, m, w.s.data(), int64_t{1}, width, og, s.D,
                         dv_part + c * block * s.D, s.D, true);
              tile::gemm(width, s.D, m, w.ds.data(), int64_t{1}, width, qg, s.D,
                         dk_part + c * block * s.D, s.D, true);
              tile::gemm(m, s.D, width, w.ds.data(), width, int64_t{1}, kv.at(b, r, c * block),
                         kv.token_step, w.partial.data(), s.D);
              for (int64_t i = 0; i < m; ++i) {
                T* out = w.dq.data() + (picked[i / s.g] * s.g + i % s.g) * s.D;
                for (int64_t d = 0; d < s.D; ++d) out[d] += w.partial[i * s.D + d];
              }
            }
          }
          store_tile<T>(w.dq.data(), s, b, r, first, count, scale, add_dq, dqv);
        }
      }
    }
  }

#pragma omp parallel for collapse(3) schedule(static)
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t r = 0; r < s.Hkv; ++r) {
      for (int64_t i = 0; i < s.keys; ++i) {
        const T* part = sums + (b * s.Hkv + r) * parts * 2 * per_head + i * s.D;
        T* dk_row = dkv.at(b, r, i);
        T* dv_row = dvv.at(b, r, i);
        std::copy_n(part, s.D, dk_row);
        std::copy_n(part + per_head, s.D, dv_row);
        for (int64_t p = 1; p < parts; ++p) {
          part += 2 * per_head;
          for (int64_t d = 0; d < s.D; ++d) {
            dk_row[d] += part[d];
            dv_row[d] += part[per_head + d];
          }
        }
      }
    }
  }
}

}  // namespace

template <>
void Kernels<Device::cpu>::attention(Tensor q, Tensor k, Tensor v, const BlockSet& blocks, Tensor o,
                                     Tensor lse, Tensor scratch, Tensor read,
                                     bool only_flops) const {
  by_type(q, [&]<class T>(T) { forward<T>(q, k, v, blocks, o, lse, scratch, read, only_flops); });
}

template <>
void Kernels<Device::cpu>::attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor dout,
                                              Tensor lse, const BlockSet& blocks, Tensor dq,
                                              Tensor dk, Tensor dv, Tensor dbias, Tensor scratch,
                                              bool add_dq) const {
  by_type(q, [&]<class T>(T) {
    backward<T>(q, k, v, o, dout, lse, blocks, dq, dk, dv, dbias, scratch, add_dq);
  });
}

template <>
int64_t Kernels<Device::cpu>::attention_scratch(Tensor, Tensor k) {
  return static_cast<int64_t>(k.bytes());  // K^T
}

template <>
int64_t Kernels<Device::cpu>::attention_backward_scratch(Tensor q, Tensor k) {
  const AttentionShape s(q.shape, k.shape);
  // K^T and V^T, then each part's dK and dV
  return static_cast<int64_t>(k.bytes()) * (2 + 2 * s.parts());
}

}  // namespace entrain
