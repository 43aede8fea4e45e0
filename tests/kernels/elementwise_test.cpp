#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

TEST(ElementwiseOnGpu, Adds) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t n : {1, 7, 8, 1000, 4099}) {
      SCOPED_TRACE(n);
      Twin a = Twin::normal({n}, real, 1), b = Twin::normal({n}, real, 2), y({n}, real);
      on_cpu.add(a.cpu, b.cpu, y.cpu);
      on_gpu.add(a.gpu, b.gpu, y.gpu);
      EXPECT_LT(y.error(), tolerance(real));
    }
  }
}

TEST(ElementwiseOnGpu, TakesWhatIsNotAligned) {
  NEEDS_GPU();
  for (const DType real : reals) {
    Twin a = Twin::normal({100}, real, 1), b = Twin::normal({100}, real, 2),
         y = Twin::zeros({100}, real);
    on_cpu.add(a.cpu.slice(0, 1, 98), b.cpu.slice(0, 2, 98), y.cpu.slice(0, 1, 98));
    on_gpu.add(a.gpu.slice(0, 1, 98), b.gpu.slice(0, 2, 98), y.gpu.slice(0, 1, 98));
    EXPECT_LT(y.error(), tolerance(real));
  }
}

TEST(ElementwiseOnGpu, CopiesRowsBetweenViews) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const int64_t D : {1, 6, 64}) {
      SCOPED_TRACE(D);
      constexpr int64_t B = 2, H = 3, N = 37, more = 5;
      Twin from = Twin::normal({B, N, H * D}, real, 1);
      Twin to = Twin::normal({B, H, N + more, D}, real, 2);
      const auto copy = [&](auto kernels, Tensor x, Tensor y) {
        kernels.copy_rows(x.split(2, D).transpose(1, 2), y.slice(2, more, N));
      };
      copy(on_cpu, from.cpu, to.cpu);
      copy(on_gpu, from.gpu, to.gpu);
      EXPECT_EQ(to.error(), 0);
    }
  }
}

}  // namespace
}  // namespace entrain
