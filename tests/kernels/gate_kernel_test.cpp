#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

/// Columns of a projection [B, N, columns] as heads [B, H, N, width].
Tensor heads(Tensor x, int64_t first, int64_t H, int64_t width) {
  return x.slice(2, first, H * width).split(2, width).transpose(1, 2);
}

TEST(GateOnGpu, OpensAndHandsBackGradients) {
  NEEDS_GPU();
  constexpr int64_t B = 2;
  for (const DType real : reals) {
    for (const int64_t H : {1, 5, 16}) {
      for (const int64_t N : {1, 70, 9001}) {
        SCOPED_TRACE(N);
        const Twin x = Twin::normal({B, N, H + 3}, real, 1),
                   bias = Twin::normal({H}, DType::f32, 2),
                   opened = Twin::normal({B, H, N, 1}, real, 3),
                   dgate = Twin::normal({B, H, N, 1}, real, 4);
        Twin gate({B, H, N, 1}, real), dx = Twin::zeros({B, N, H + 3}, real),
                                       dbias = Twin::normal({H}, DType::f32, 5);
        on_cpu.gate(heads(x.cpu, 2, H, 1), bias.cpu, gate.cpu);
        on_gpu.gate(heads(x.gpu, 2, H, 1), bias.gpu, gate.gpu);
        EXPECT_LT(gate.error(), tolerance(real));
        on_cpu.gate_backward(dgate.cpu, opened.cpu, heads(dx.cpu, 2, H, 1), dbias.cpu);
        on_gpu.gate_backward(dgate.gpu, opened.gpu, heads(dx.gpu, 2, H, 1), dbias.gpu);
        EXPECT_LT(dx.error(), tolerance(real));
        EXPECT_LT(dbias.error(), 1e-5);
      }
    }
  }
}

TEST(GateOnGpu, ScalesRows) {
  NEEDS_GPU();
  constexpr int64_t B = 2, H = 3, N = 45;
  for (const DType real : reals) {
    for (const int64_t D : {1, 6, 24, 64, 128, 520}) {
      SCOPED_TRACE(D);
      const Twin x = Twin::normal({B, H, N, D}, real, 1), g = Twin::normal({B, H, N, 1}, real, 2),
                 dy = Twin::normal({B, N, H * D}, real, 3);
      Twin y({B, N, H * D}, real), dx({B, H, N, D}, real), dg({B, H, N, 1}, real);
      for (const bool add : {false, true}) {
        on_cpu.scale_rows(x.cpu, g.cpu, add, heads(y.cpu, 0, H, D));
        on_gpu.scale_rows(x.gpu, g.gpu, add, heads(y.gpu, 0, H, D));
        EXPECT_LT(y.error(), tolerance(real));
      }
      on_cpu.scale_rows_backward(heads(dy.cpu, 0, H, D), x.cpu, g.cpu, dx.cpu, dg.cpu);
      on_gpu.scale_rows_backward(heads(dy.gpu, 0, H, D), x.gpu, g.gpu, dx.gpu, dg.gpu);
      EXPECT_LT(dx.error(), tolerance(real));
      EXPECT_LT(dg.error(), tolerance(real));
    }
  }
}

}  // namespace
}  // namespace entrain
