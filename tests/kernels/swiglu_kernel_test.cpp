#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

TEST(SwigluOnGpu, ForwardAndBackward) {
  NEEDS_GPU();
  struct Rows {
    int64_t T, f;
  };
  for (const DType real : {DType::f32, DType::bf16}) {
    for (const auto [T, f] : {Rows{1, 1}, Rows{3, 7}, Rows{65, 40}, Rows{130, 1408}}) {
      SCOPED_TRACE(f);
      Twin gate_up = Twin::normal({T, 2 * f}, real, 1, 3);
      if (f > 1) gate_up.cpu.ptr<double>()[0] = -200;  // e^200 is not a float
      gate_up.send();
      const Twin dy = Twin::normal({T, f}, real, 2);
      Twin y({T, f}, real), dgate_up({T, 2 * f}, real);
      on_cpu.swiglu(gate_up.cpu, y.cpu);
      on_gpu.swiglu(gate_up.gpu, y.gpu);
      EXPECT_LT(y.error(), tolerance(real));
      on_cpu.swiglu_backward(dy.cpu, gate_up.cpu, dgate_up.cpu);
      on_gpu.swiglu_backward(dy.gpu, gate_up.gpu, dgate_up.gpu);
      EXPECT_LT(dgate_up.error(), tolerance(real));
    }
  }
}

}  // namespace
}  // namespace entrain
