#include "dist/buckets.h"

#include "core/error.h"

namespace entrain {

void Buckets::add(Tensor stretch) {
  if (pending_) {
    const float *begin = stretch.ptr<float>(), *pending = pending_.ptr<float>();
    require(begin + stretch.numel() <= pending, "gradients must become final from back to front");
    const int64_t n = pending + pending_.numel() - begin;
    stretch = Tensor::of(stretch.data, {n}, stretch.dtype, stretch.device);
  }
  pending_ = stretch;
  if (pending_.bytes() >= least_) start();
}

void Buckets::wait() {
  waiting_.reset();
  waiting_.start();
  if (pending_) start();
  comm_.wait();
  waiting_.stop();
}

void Buckets::start() {
  comm_.start_sum(pending_);
  pending_ = {};
}

}  // namespace entrain
