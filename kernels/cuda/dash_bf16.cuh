#pragma once
// DashAttention's router for bf16 queries, in float; dash.cu and dash_backward.cu call it where it
// fits.
#include "kernels/cuda/route_bf16.cuh"

namespace entrain::cuda {

/// On Hopper, with head_dim 64 or 128, over any number of chunks. Whether it routed: not with
/// softmax before entmax, nor more than 64 heads to a kv head.
bool route_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                  const Tensor& tau, const BlockSet& blocks, const Tensor& weights,
                  const Tensor& scratch, const Tensor& read);

/// Whether it routed: not with softmax before entmax, over more than 512 candidates or float.
bool route_bf16(const Tensor& q, const Tensor& kbar, const DashRouting& routing, const Tensor& tau,
                const BlockSet& blocks, const Tensor& weights, const Tensor& read);

/// Whether it routed: a few queries, on Hopper, as while decoding; route_decode.cu. beside: see
/// Kernels::dash_route.
bool route_decode(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                  const Tensor& tau, const BlockSet& blocks, const Tensor& weights,
                  const Tensor& read, bool beside);

/// The way back on Hopper, over any number of candidates; route_hopper_backward.cu. Whether it took
/// the problem. dbias is written over. scratch: f64 [hopper_route_backward_scratch()].
bool route_backward_hopper(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                           const Tensor& tau, const BlockSet& blocks, const Tensor& dbias,
                           const Tensor& dq_sum, const Tensor& dkbar, const Tensor& scratch);
/// 0 where it never does.
int64_t hopper_route_backward_scratch(const Shape& q, const Shape& kbar);

/// The way back elsewhere; dash_bf16_backward.cu. Whether it took the problem. scratch: f32 [B,
/// Hkv, parts, M, D].
bool route_backward_bf16(const Tensor& q, const Tensor& kbar, const DashRouting& routing,
                         const Tensor& tau, const Tensor& dbias, const Tensor& dq_sum,
                         const Tensor& dkbar, int64_t parts, const Tensor& scratch);

}  // namespace entrain::cuda
