#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};
constexpr double alphas[] = {1, 1.25, 1.5, 1.75, 2};
constexpr int64_t R = 9;

TEST(EntmaxOnGpu, ForwardWithinTheLengthOfEachRow) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const double alpha : alphas) {
      for (const int64_t n : {1, 5, 33, 700}) {
        for (const double deviation : {0.01, 1.0, 1e4}) {
          SCOPED_TRACE(n);
          const Twin z = Twin::normal({R, n}, real, 1, deviation);
          Twin p({R, n}, real), length({R}, DType::i32);
          for (int64_t row = 0; row < R; ++row) {
            length.cpu.ptr<int32_t>()[row] = static_cast<int32_t>(n * row / (R - 1));
          }
          length.send();
          on_cpu.entmax(z.cpu, length.cpu, alpha, p.cpu);
          on_gpu.entmax(z.gpu, length.gpu, alpha, p.gpu);
          EXPECT_LT(p.error(), tolerance(real)) << "alpha " << alpha;
          const Tensor host = p.fetch();
          for (int64_t i = 0; i < host.numel(); ++i) {
            const bool off = p.cpu.ptr<double>()[i] == 0;
            EXPECT_TRUE(!off || host.ptr<float>()[i] == 0) << i;
          }
        }
      }
    }
  }
}

TEST(EntmaxOnGpu, Backward) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const double alpha : alphas) {
      for (const int64_t n : {5, 33, 700}) {
        Twin p = Twin::normal({R, n}, real, 1);
        const Twin dp = Twin::normal({R, n}, real, 2);
        for (int64_t i = 0; i < p.cpu.numel(); ++i) {
          double& x = p.cpu.ptr<double>()[i];
          x = i < n ? 0 : std::max(0.0, x);  // the first row is empty
        }
        p.send();
        Twin dz({R, n}, real);
        on_cpu.entmax_backward(p.cpu, dp.cpu, alpha, dz.cpu);
        on_gpu.entmax_backward(p.gpu, dp.gpu, alpha, dz.gpu);
        EXPECT_LT(dz.error(), tolerance(real)) << "alpha " << alpha;
      }
    }
  }
}

TEST(EntmaxOnGpu, NanShows) {
  NEEDS_GPU();
  Twin z = Twin::normal({1, 40}, DType::f32, 1), p({1, 40}, DType::f32), length({1}, DType::i32);
  z.cpu.ptr<double>()[7] = NAN;
  z.send();
  length.cpu.ptr<int32_t>()[0] = 40;
  length.send();
  for (const double alpha : alphas) {
    on_gpu.entmax(z.gpu, length.gpu, alpha, p.gpu);
    EXPECT_TRUE(std::isnan(p.fetch().ptr<float>()[7])) << alpha;
  }
}

}  // namespace
}  // namespace entrain
