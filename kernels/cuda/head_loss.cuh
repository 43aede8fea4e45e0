#pragma once
// What the output head's loss does between its matrix products.
#include "kernels/cuda/common.cuh"

namespace entrain::cuda {

/// For rows of logits [rows, V]: loss f32 [rows] of targets i32 [rows] in nats, and predicted i32
/// [rows] (or empty), the lowest id of the largest logit. With `gradient`, logits become their own
/// gradient, scale (softmax - onehot).
void softmax_cross_entropy(Tensor logits, Tensor targets, double scale, Tensor loss,
                           Tensor predicted, bool gradient);

}  // namespace entrain::cuda
