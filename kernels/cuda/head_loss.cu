// The head and its cross-entropy in strips of rows: logits by cuBLASLt, loss and the gradient of
// the logits in their place by one kernel, then both products back. For T tokens and a vocabulary
// V: the logits of a strip are written, read, overwritten and read twice, 10 T V bytes in bf16; 6 T
// V d operations.
#include <algorithm>

#include "kernels/cuda/head_loss.cuh"

namespace entrain {

template <>
void Kernels<Device::cuda>::head_loss(Tensor x, Tensor w, Tensor targets, double scale, Tensor loss,
                                      Tensor predicted, Tensor dx, Tensor dw_sum,
                                      Tensor logits) const {
  for (int64_t first = 0; first < x[0]; first += logits[0]) {
    const int64_t rows = std::min(logits[0], x[0] - first);
    const auto strip = [&](const Tensor& t) { return t ? t.slice(0, first, rows) : t; };
    const Tensor strip_logits = logits.slice(0, 0, rows);
    linear(strip(x), w, strip_logits);
    cuda::softmax_cross_entropy(strip_logits, strip(targets), scale, strip(loss), strip(predicted),
                                static_cast<bool>(dx));
    if (dx) linear_backward(strip_logits, strip(x), w, strip(dx), dw_sum);
  }
}

}  // namespace entrain
