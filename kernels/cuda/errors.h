#pragma once
// Errors of files that nvcc compiles, which cannot read core/error.h for fmt's sake.
#include <string>

namespace entrain::cuda {

[[noreturn]] void throw_error(const std::string& message);
[[noreturn]] void throw_out_of_memory(const std::string& message);

}  // namespace entrain::cuda
