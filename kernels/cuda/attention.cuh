#pragma once
// One attention problem as its kernels take it, and the kernels that attention.cu chooses from.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

constexpr float log2_e = 1.44269504f;

/// What queries see of the keys (see BlockSet): those complete at their token, of these the last of
/// the window.
struct Sight {
  int64_t length = 1, stride = 1;  // a key stands for this run of tokens
  int64_t window = 0;              // > 0: only so many keys up to the query

  /// Keys complete at a token, and the first of them that a query there sees.
  __host__ __device__ int64_t end(int64_t token) const {
    return token + 1 < length ? 0 : (token + 1 - length) / stride + 1;
  }
  __host__ __device__ int64_t begin(int64_t end) const {
    return window > 0 && end > window ? end - window : 0;
  }
  /// The first token at which key j is seen, and the first at which it no longer is.
  __host__ __device__ int64_t first_token(int64_t j) const { return j * stride + length - 1; }
  __host__ __device__ int64_t last_token(int64_t j) const {
    return window > 0 ? first_token(j + window) : int64_t{1} << 62;
  }
};

/// q [B, Hq, N, D] over k, v [B, Hkv, keys, D]; query i is token first + i. A block is `block`
/// keys.
struct AttentionProblem {
  int64_t B, Hq, Hkv, g, N, D, keys, block, first;
  Sight sight;
  const uint64_t* mask;  // [B, Hkv, N, words], or null: every block
  int64_t words;
  const float* bias;  // [B, Hkv, N, bias_blocks], or null
  int64_t bias_blocks;

  AttentionProblem(const Tensor& q, const Tensor& k, const BlockSet& blocks);
  float scale() const;  // 1 / sqrt(D)
  int64_t blocks() const { return ceil_div(keys, block); }
  /// Plain causal attention over all keys, as libraries have it.
  bool dense() const {
    return !mask && !bias && sight.window == 0 && sight.length == 1 && first == 0;
  }
};

/// What backward writes; see Kernels::attention_backward.
template <class T>
struct AttentionGrads {
  Rows<T> dq, dk, dv;
  float* dbias;  // [B, Hkv, N, blocks()], or null
  bool add_dq;
};

// attention_f32.cu and attention_bf16.cu: any problem.
void attention_forward(const AttentionProblem& p, Rows<float> q, Rows<float> k, Rows<float> v,
                       Rows<float> o, float* lse);
void attention_forward(const AttentionProblem& p, Rows<bf16> q, Rows<bf16> k, Rows<bf16> v,
                       Rows<bf16> o, float* lse);
/// delta f32 [B, Hq, N]: scratch, the sums of o dout over D.
void attention_backward(const AttentionProblem& p, Rows<float> q, Rows<float> k, Rows<float> v,
                        Rows<float> o, Rows<float> dout, const float* lse, float* delta,
                        const AttentionGrads<float>& grads);
void attention_backward(const AttentionProblem& p, Rows<bf16> q, Rows<bf16> k, Rows<bf16> v,
                        Rows<bf16> o, Rows<bf16> dout, const float* lse, float* delta,
                        const AttentionGrads<bf16>& grads);

// attention_decode.cu
struct ReadSums;
/// Whether it computed the problem, and counted what it read: few queries, in bf16, over any keys
/// or over blocks of 64.
bool attention_decode(const AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& o, float* lse, const ReadSums& sums);

/// Whether this is Hopper and the tensors are bf16, of head_dim 64 or 128, and lie as its copy
/// engine wants it; what has been checked of them holds for others that lie alike.
bool hopper_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors);

// attention_hopper_dq.cu: backward of dense() problems on Hopper.
/// Whether it takes a problem of these tensors.
bool hopper_attention_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors);
/// Bytes of scratch; attention_hopper_numbers.cu.
int64_t query_numbers_scratch(const AttentionProblem& p);
void hopper_attention_backward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                               const Rows<bf16>& v, const Rows<bf16>& o, const Rows<bf16>& dout,
                               const float* lse, float* scratch, const AttentionGrads<bf16>& grads);

// attention_sparse_forward.cu: 64 queries or more over blocks of whole tiles of 64 keys, or over
// all that they see, on Hopper.
/// Whether it takes a problem of these tensors, and whether with dbias.
bool sparse_attention_takes(const AttentionProblem& p, std::initializer_list<Tensor> tensors,
                            bool dbias = false);
void sparse_attention_forward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                              const Rows<bf16>& v, const Rows<bf16>& o, float* lse);
// attention_sparse_dq.cu: backward of the same problems.
/// Bytes of scratch; those of a problem do for others with fewer keys.
int64_t sparse_attention_scratch(const AttentionProblem& p);
void sparse_attention_backward(const AttentionProblem& p, const Rows<bf16>& q, const Rows<bf16>& k,
                               const Rows<bf16>& v, const Rows<bf16>& o, const Rows<bf16>& dout,
                               const float* lse, float* scratch, const AttentionGrads<bf16>& grads);

// dense_attention.cpp where cuDNN is there, otherwise no_cudnn.cpp, which never takes a problem.
/// Whether the library takes a problem of these shapes, strides and types: dense() ones in bf16.
bool dense_attention_takes(const AttentionProblem& p, const Tensor& q, const Tensor& k);
/// Bytes of scratch, for the backward pass or for the forward pass.
int64_t dense_attention_scratch(const AttentionProblem& p, const Tensor& q, const Tensor& k,
                                bool backward);
void dense_attention(const AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& o, float* lse, void* scratch);
void dense_attention_backward(const AttentionProblem& p, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& dout,
                              const float* lse, const Tensor& dq, const Tensor& dk,
                              const Tensor& dv, void* scratch);

}  // namespace entrain::cuda
