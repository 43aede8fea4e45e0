#pragma once
// Where a command computes, and in which type.
#include <string>

#include "core/tensor.h"

namespace entrain {

/// auto (the GPU where there is one), cpu or cuda. Throws ConfigError for cuda where there is none,
/// saying why.
Device choose_device(const std::string& name);

/// auto (bf16 on the GPU, f32 on the CPU), f32 or bf16, of activations. Throws ConfigError where
/// the device does not compute in it.
DType choose_dtype(const std::string& name, Device device);

}  // namespace entrain
