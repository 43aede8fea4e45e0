#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

TEST(RopeOnGpu, RotatesHeadsWithinAProjection) {
  NEEDS_GPU();
  constexpr int64_t B = 2, N = 35;
  for (const DType real : {DType::f32, DType::bf16}) {
    for (const int64_t D : {2, 6, 16, 64, 80, 128}) {
      for (const int64_t H : {1, 5, 24}) {
        for (const bool inverse : {false, true}) {
          SCOPED_TRACE(D);
          // Heads before and after, which must stay as they are.
          Twin x = Twin::normal({B, N, (H + 3) * D}, real, 1);
          const Twin cos_sin = Twin::normal({N, D}, DType::f32, 2);
          const auto heads = [&](Tensor t) {
            return t.slice(2, D, H * D).split(2, D).transpose(1, 2);
          };
          on_cpu.rope(heads(x.cpu), cos_sin.cpu, inverse);
          on_gpu.rope(heads(x.gpu), cos_sin.gpu, inverse);
          EXPECT_LT(x.error(), tolerance(real));
        }
      }
    }
  }
}

TEST(RopeOnGpu, TakesATableFromTheMiddleAndOtherOrders) {
  NEEDS_GPU();
  constexpr int64_t H = 3, N = 1, D = 64;
  for (const DType real : {DType::f32, DType::bf16}) {
    Twin x = Twin::normal({1, H, N, D}, real, 1);  // a cache's order, one token of a sequence
    const Twin cos_sin = Twin::normal({9, D}, DType::f32, 2);
    on_cpu.rope(x.cpu, cos_sin.cpu.slice(0, 7, N), false);
    on_gpu.rope(x.gpu, cos_sin.gpu.slice(0, 7, N), false);
    EXPECT_LT(x.error(), tolerance(real));
  }
}

}  // namespace
}  // namespace entrain
