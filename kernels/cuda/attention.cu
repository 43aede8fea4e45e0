// Attention over blocks of keys: which kernel computes a problem, and the counters of what it read.
// Plain causal attention in bf16 goes to the library where there is one, its backward pass on
// Hopper to kernels for that GPU (attention_hopper_*.cu), as does attention over blocks of whole
// tiles (attention_sparse_*.cu); a few queries in bf16 go to attention_decode.cu, everything else
// to kernels for any problem, attention_bf16_*.cu and attention_f32.cu.
#include <cmath>
#include <limits>

#include "kernels/cuda/attention_read.cuh"

namespace entrain {
namespace cuda {
namespace {

void check_like(const char* name, const Tensor& t, const Tensor& like) {
  if (t.shape == like.shape && t.dtype == like.dtype) return;
  fail(std::string("attention: ") + name + " " + t.shape.to_string() + " of " + name_of(t.dtype) +
       " should be " + like.shape.to_string() + " of " + name_of(like.dtype));
}

/// Counts all that is read. Grid (parts, Hkv): a thread takes queries of one kv head and the batch.
/// Bytes: the masks.
__global__ void __launch_bounds__(256) attention_read(const AttentionProblem p, ReadSums sums) {
  __shared__ int64_t shared[32];
  const int64_t r = blockIdx.y, step = int64_t{gridDim.x} * blockDim.x;
  ReadCount count;
  for (int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; x < p.B * p.N; x += step) {
    count.add(p, x / p.N, r, x % p.N);
  }
  for (int64_t* of : {&count.pairs, &count.visits, &count.queries, &count.causal}) {
    *of = block_sum(*of, shared);
  }
  if (threadIdx.x == 0) sums.add(p, r, count);
}

void count_read(const AttentionProblem& p, const ReadSums& sums) {
  const auto parts = static_cast<unsigned>(std::min<int64_t>(ceil_div(p.B * p.N, 256), 64));
  const dim3 grid(parts, static_cast<unsigned>(p.Hkv));
  attention_read<<<grid, 256, 0, stream()>>>(p, sums);
  check_launch("attention_read");
}

/// Where the library may compute a problem: bf16, all keys.
bool library_takes(const AttentionProblem& p, const Tensor& q, const Tensor& k) {
  return q.dtype == DType::bf16 && p.dense() && dense_attention_takes(p, q, k);
}

/// What the library needs for all of k's keys, or 0 where it takes no such problem.
int64_t library_scratch(const Tensor& q, const Tensor& k, bool backward) {
  if (k[2] != q[2]) return 0;  // keys that stand for runs of tokens
  const AttentionProblem p(q, k, {});
  return library_takes(p, q, k) ? dense_attention_scratch(p, q, k, backward) : 0;
}

}  // namespace

AttentionProblem::AttentionProblem(const Tensor& q, const Tensor& k, const BlockSet& blocks)
    : B(q[0]),
      Hq(q[1]),
      Hkv(k[1]),
      g(Hkv > 0 ? Hq / Hkv : 0),
      N(q[2]),
      D(q[3]),
      keys(blocks.keys.within(blocks.first + N)),
      block(blocks.block),
      first(blocks.first),
      sight{blocks.keys.length, blocks.keys.stride, blocks.window},
      mask(pointer<uint64_t>(blocks.mask)),
      words(blocks.mask ? blocks.mask[3] : 0),
      bias(pointer<float>(blocks.bias)),
      bias_blocks(blocks.bias ? blocks.bias[3] : 0) {
  const bool fit = q.shape.rank == 4 && k.shape.rank == 4 && k[0] == B && k[2] == keys &&
                   k[3] == D && g * Hkv == Hq;
  if (!fit)
    fail("attention of queries " + q.shape.to_string() + " over keys " + k.shape.to_string());
  if (D % 2 != 0 || D > 256) {
    fail("attention on the GPU takes an even head_dim up to 256, not " + std::to_string(D));
  }
  if (block < 1 || (mask && words * 64 < this->blocks()) ||
      (bias && bias_blocks < this->blocks())) {
    fail("attention over " + std::to_string(keys) + " keys in blocks of " + std::to_string(block) +
         ": the mask " + blocks.mask.shape.to_string() + " or bias " +
         blocks.bias.shape.to_string() + " has fewer blocks");
  }
}

float AttentionProblem::scale() const {
  return 1 / std::sqrt(static_cast<float>(D));
}

}  // namespace cuda

using namespace cuda;

template <>
void Kernels<Device::cuda>::attention(Tensor q, Tensor k, Tensor v, const BlockSet& blocks,
                                      Tensor o, Tensor lse, Tensor scratch, Tensor read,
                                      bool only_flops) const {
  const AttentionProblem p(q, k, blocks);
  check_like("k", k, Tensor{.dtype = q.dtype, .shape = k.shape});
  check_like("v", v, k);
  check_like("o", o, q);
  if (p.B * p.Hq * p.N == 0) return;
  const ReadSums sums{pointer<double>(read), only_flops};
  if (scratch && library_takes(p, q, k)) {
    dense_attention(p, q, k, v, o, pointer<float>(lse), pointer<uint8_t>(scratch));
  } else if (sparse_attention_takes(p, {q, k, v, o})) {
    sparse_attention_forward(p, Rows<bf16>(q), Rows<bf16>(k), Rows<bf16>(v), Rows<bf16>(o),
                             pointer<float>(lse));
  } else if (attention_decode(p, q, k, v, o, pointer<float>(lse), sums)) {
    return;  // which counts as well
  } else {
    by_type(q, [&]<class T>(T) {
      attention_forward(p, Rows<T>(q), Rows<T>(k), Rows<T>(v), Rows<T>(o), pointer<float>(lse));
    });
  }
  if (read) count_read(p, sums);
}

/// Never 0: while decoding an empty scratch tells that keys are not to be prepared.
template <>
int64_t Kernels<Device::cuda>::attention_scratch(Tensor q, Tensor k) {
  return std::max<int64_t>(256, library_scratch(q, k, false));
}

template <>
void Kernels<Device::cuda>::attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor dout,
                                               Tensor lse, const BlockSet& blocks, Tensor dq,
                                               Tensor dk, Tensor dv, Tensor dbias, Tensor scratch,
                                               bool add_dq) const {
  const AttentionProblem p(q, k, blocks);
  check_like("k", k, Tensor{.dtype = q.dtype, .shape = k.shape});
  for (const Tensor* like_k : {&v, &dk, &dv}) check_like("v, dk or dv", *like_k, k);
  for (const Tensor* like_q : {&o, &dout, &dq}) check_like("o, dout or dq", *like_q, q);
  if (p.B * p.Hq * p.N == 0) return;
  auto* floats = reinterpret_cast<float*>(pointer<uint8_t>(scratch));
  if (!dbias && !add_dq && hopper_attention_takes(p, {q, k, v, o, dout, dq, dk, dv})) {
    hopper_attention_backward(p, Rows<bf16>(q), Rows<bf16>(k), Rows<bf16>(v), Rows<bf16>(o),
                              Rows<bf16>(dout), pointer<float>(lse), floats,
                              {Rows<bf16>(dq), Rows<bf16>(dk), Rows<bf16>(dv), nullptr, false});
    return;
  }
  if (!dbias && !add_dq && !hopper_attention_takes(p, {q, k}) && library_takes(p, q, k)) {
    dense_attention_backward(p, q, k, v, o, dout, pointer<float>(lse), dq, dk, dv,
                             pointer<uint8_t>(scratch));
    return;
  }
  if (sparse_attention_takes(p, {q, k, v, o, dout, dq, dk, dv}, bool(dbias))) {
    sparse_attention_backward(
        p, Rows<bf16>(q), Rows<bf16>(k), Rows<bf16>(v), Rows<bf16>(o), Rows<bf16>(dout),
        pointer<float>(lse), floats,
        {Rows<bf16>(dq), Rows<bf16>(dk), Rows<bf16>(dv), pointer<float>(dbias), add_dq});
    return;
  }
  by_type(q, [&]<class T>(T) {
    const AttentionGrads<T> grads{Rows<T>(dq), Rows<T>(dk), Rows<T>(dv), pointer<float>(dbias),
                                  add_dq};
    entrain::cuda::attention_backward(p, Rows<T>(q), Rows<T>(k), Rows<T>(v), Rows<T>(o),
                                      Rows<T>(dout), pointer<float>(lse), floats, grads);
  });
}

template <>
int64_t Kernels<Device::cuda>::attention_backward_scratch(Tensor q, Tensor k) {
  int64_t bytes = ceil_div(q[0] * q[1] * q[2] * 4, 256) * 256;  // delta, f32 [B, Hq, N]
  if (k[2] == q[2]) {
    const AttentionProblem p(q, k, {});
    if (sparse_attention_takes(p, {q, k})) bytes = std::max(bytes, sparse_attention_scratch(p));
    if (hopper_attention_takes(p, {q, k})) return std::max(bytes, query_numbers_scratch(p));
  }
  return std::max(bytes, library_scratch(q, k, true));
}

}  // namespace entrain
