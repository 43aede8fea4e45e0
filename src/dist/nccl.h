#pragma once
// Ranks joined by NCCL, one process a GPU. A build without CUDA links kernels/no_cuda instead,
// which refuses.
#include <memory>

#include "dist/comm.h"

namespace entrain {

/// The launcher's ranks, on the GPU that each has chosen (gpu::use) and its one stream. The
/// launcher introduces them to each other; all else they exchange goes through NCCL, small host
/// values too. Where NCCL finds the connection broken while a rank waits, it says so and ends its
/// process.
std::unique_ptr<Comm> make_gpu_comm(std::unique_ptr<Comm> launcher);

}  // namespace entrain
