// The kernels of a build without CUDA: none. Nothing reaches them, as there is no memory of a GPU.
#include "kernels/kernels.h"

#include "core/error.h"
#include "core/gpu.h"

namespace entrain {
namespace {

[[noreturn]] void refuse() {
  fail("{}", gpu::why_unavailable());
}

}  // namespace

template <>
void Kernels<Device::cuda>::copy_rows(Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::add(Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::embedding(Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::embedding_backward(Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::linear(Tensor, Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::linear_backward(Tensor, Tensor, Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::rmsnorm(Tensor, Tensor, double, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::rmsnorm_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::rope(Tensor, Tensor, bool) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::swiglu(Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::swiglu_backward(Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::head_loss(Tensor, Tensor, Tensor, double, Tensor, Tensor, Tensor,
                                      Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::attention(Tensor, Tensor, Tensor, const BlockSet&, Tensor, Tensor,
                                      Tensor, Tensor, bool) const {
  refuse();
}
template <>
int64_t Kernels<Device::cuda>::attention_scratch(Tensor, Tensor) {
  refuse();
}
template <>
void Kernels<Device::cuda>::attention_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                               const BlockSet&, Tensor, Tensor, Tensor, Tensor,
                                               Tensor, bool) const {
  refuse();
}
template <>
int64_t Kernels<Device::cuda>::attention_backward_scratch(Tensor, Tensor) {
  refuse();
}
template <>
void Kernels<Device::cuda>::dash_summaries(Tensor, Tensor, int64_t, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::dash_summaries_backward(Tensor, Tensor, int64_t, Tensor, Tensor,
                                                    Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::dash_route(Tensor, Tensor, const DashRouting&, Tensor, const BlockSet&,
                                       Tensor, Tensor, Tensor, bool) const {
  refuse();
}
template <>
int64_t Kernels<Device::cuda>::dash_route_scratch(const Shape&, const Shape&) {
  refuse();
}
template <>
void Kernels<Device::cuda>::dash_route_backward(Tensor, Tensor, const DashRouting&, Tensor,
                                                const BlockSet&, Tensor, Tensor, Tensor,
                                                Tensor) const {
  refuse();
}
template <>
int64_t Kernels<Device::cuda>::dash_route_backward_scratch(const Shape&, const Shape&) {
  refuse();
}
template <>
void Kernels<Device::cuda>::dash_entropy(Tensor, Tensor, const DashRouting&, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::pool_runs(Tensor, Runs, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::unfold_runs(Tensor, Runs, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::fold_runs(Tensor, Tensor, Runs, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::add_rows(Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::select_blocks(Tensor, Tensor, const BlockSelection&, const BlockSet&,
                                          Tensor, Tensor) const {
  refuse();
}
template <>
int64_t Kernels<Device::cuda>::select_scratch(const Shape&) {
  refuse();
}
template <>
void Kernels<Device::cuda>::read_window(const BlockSet&, int64_t, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::gate(Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::gate_backward(Tensor, Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::scale_rows(Tensor, Tensor, bool, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::scale_rows_backward(Tensor, Tensor, Tensor, Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::entmax(Tensor, Tensor, double, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::entmax_backward(Tensor, Tensor, double, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::add_sum(Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::sum_of_squares(Tensor, Tensor) const {
  refuse();
}
template <>
void Kernels<Device::cuda>::adamw(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, const AdamW&,
                                  Tensor) const {
  refuse();
}

}  // namespace entrain
