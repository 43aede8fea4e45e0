#pragma once
// Where a command computes, and in which type.
#include <memory>
#include <string>

#include "core/tensor.h"
#include "dist/comm.h"

namespace entrain {

/// auto (the GPU where there is one), cpu or cuda. Throws ConfigError for cuda where there is none,
/// saying why.
Device choose_device(const std::string& name);

/// The choice of a run's ranks, decided for all of them: each takes a GPU of its own, by its number
/// on its host. Where one finds none left, or none at all, auto means the CPU for all, and cuda
/// throws ConfigError. Returns the communicator of that device.
std::unique_ptr<Comm> place_ranks(const std::string& name, std::unique_ptr<Comm> launcher);

/// auto (bf16 on the GPU, f32 on the CPU), f32 or bf16, of activations. Throws ConfigError where
/// the device does not compute in it.
DType choose_dtype(const std::string& name, Device device);

}  // namespace entrain
