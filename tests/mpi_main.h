#pragma once
// What tests under mpirun share: every rank runs the same tests.
#include <algorithm>
#include <vector>

#include "core/arena.h"
#include "core/mirror.h"
#include "dist/comm.h"

namespace entrain {

/// The communicator of this run, on the device that TEST_DEVICE names, by default the CPU.
Comm& world();

/// Floats where the communicator sums them.
class Floats {
 public:
  explicit Floats(const std::vector<float>& values)
      : memory_(values.size() * sizeof(float), world().device()),
        mirror_(Tensor::of(memory_.data(), {static_cast<int64_t>(values.size())}, DType::f32,
                           world().device())) {
    std::ranges::copy(values, mirror_.host().ptr<float>());
    mirror_.upload();
  }

  const Tensor& tensor() const { return mirror_.tensor(); }
  std::vector<float> values() {
    mirror_.download();
    const float* begin = mirror_.host().ptr<float>();
    return {begin, begin + mirror_.host().numel()};
  }

 private:
  Buffer memory_;
  Mirror mirror_;
};

}  // namespace entrain
