#include "kernels/cuda/errors.h"

#include "core/error.h"

namespace entrain::cuda {

void throw_error(const std::string& message) {
  throw Error(message);
}

void throw_out_of_memory(const std::string& message) {
  throw OutOfMemory(message);
}

}  // namespace entrain::cuda
