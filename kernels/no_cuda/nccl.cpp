// A build without CUDA has no GPUs to join.
#include "dist/nccl.h"

#include "core/gpu.h"

namespace entrain {

std::unique_ptr<Comm> make_gpu_comm(std::unique_ptr<Comm>) {
  fail("{}", gpu::why_unavailable());
}

}  // namespace entrain
