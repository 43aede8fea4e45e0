// Where cuDNN was not found: the own kernels take every problem.
#include "kernels/cuda/attention.cuh"

namespace entrain::cuda {

bool dense_attention_takes(const AttentionProblem&, const Tensor&, const Tensor&) {
  return false;
}

int64_t dense_attention_scratch(const AttentionProblem&, const Tensor&, const Tensor&, bool) {
  fail("built without cuDNN");
}

void dense_attention(const AttentionProblem&, const Tensor&, const Tensor&, const Tensor&,
                     const Tensor&, float*, void*) {
  fail("built without cuDNN");
}

void dense_attention_backward(const AttentionProblem&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const float*, const Tensor&,
                              const Tensor&, const Tensor&, void*) {
  fail("built without cuDNN");
}

}  // namespace entrain::cuda
