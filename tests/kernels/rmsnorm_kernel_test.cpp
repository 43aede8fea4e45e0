#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr double eps = 1e-5;

TEST(RmsnormOnGpu, ForwardAndBackward) {
  NEEDS_GPU();
  struct Rows {
    int64_t T, d;
  };
  // Rows of less than a pack a lane, of several, and those that are not aligned.
  for (const DType real : {DType::f32, DType::bf16}) {
    for (const auto [T, d] : {Rows{1, 8}, Rows{5, 7}, Rows{33, 512}, Rows{5000, 264},
                              Rows{37, 2816}, Rows{3, 1030}, Rows{9, 12000}}) {
      SCOPED_TRACE(d);
      const Twin x = Twin::normal({T, d}, real, 1), w = Twin::normal({d}, DType::f32, 2),
                 dy = Twin::normal({T, d}, real, 3);
      Twin y({T, d}, real), rstd({T}, DType::f32);
      on_cpu.rmsnorm(x.cpu, w.cpu, eps, y.cpu, rstd.cpu);
      on_gpu.rmsnorm(x.gpu, w.gpu, eps, y.gpu, rstd.gpu);
      EXPECT_LT(y.error(), tolerance(real));
      EXPECT_LT(rstd.error(), 1e-5);

      Twin dx = Twin::normal({T, d}, real, 4), dw = Twin::normal({d}, DType::f32, 5);
      on_cpu.rmsnorm_backward(dy.cpu, x.cpu, w.cpu, rstd.cpu, dx.cpu, dw.cpu);
      on_gpu.rmsnorm_backward(dy.gpu, x.gpu, w.gpu, rstd.gpu, dx.gpu, dw.gpu);
      EXPECT_LT(dx.error(), tolerance(real));
      EXPECT_LT(dw.error(), 1e-5);

      Twin again = Twin::normal({d}, DType::f32, 5);
      on_gpu.rmsnorm_backward(dy.gpu, x.gpu, w.gpu, rstd.gpu, dx.gpu, again.gpu);
      const Tensor first = dw.fetch(), second = again.fetch();
      EXPECT_EQ(std::memcmp(first.data, second.data, first.bytes()), 0);
    }
  }
}

TEST(RmsnormOnGpu, NanStaysInItsRow) {
  NEEDS_GPU();
  Twin x = Twin::normal({3, 64}, DType::bf16, 1), w = Twin::constant({64}, DType::f32, 1);
  x.cpu.ptr<double>()[64] = NAN;
  x.send();
  Twin y({3, 64}, DType::bf16), rstd({3}, DType::f32);
  on_gpu.rmsnorm(x.gpu, w.gpu, eps, y.gpu, rstd.gpu);
  const Tensor host = y.fetch();
  for (int64_t i = 0; i < y.cpu.numel(); ++i) {
    EXPECT_EQ(std::isnan(host.ptr<float>()[i]), i / 64 == 1) << i;
  }
}

}  // namespace
}  // namespace entrain
