#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};
constexpr int64_t B = 2, H = 3;

struct Case {
  int64_t N, D;
  Runs runs;
};
// Overlapping runs, runs with gaps, whole blocks, no run at all, rows that are not aligned.
constexpr Case cases[] = {
    {100, 64, {32, 16}}, {50, 6, {4, 7}}, {64, 24, {16, 16}}, {10, 8, {32, 16}}, {37, 1, {5, 2}}};

/// Some heads of a projection [B, N, columns].
Tensor heads(Tensor x, int64_t D) {
  return x.slice(2, D, H * D).split(2, D).transpose(1, 2);
}

TEST(RunsOnGpu, PoolsToBothTypes) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.N);
      const int64_t W = c.runs.within(c.N);
      const Twin x = Twin::normal({B, c.N, (H + 1) * c.D}, real, 1);
      Twin means = Twin::zeros({B, H, W + 2, c.D}, real);  // the first and the last stay so
      on_cpu.pool_runs(heads(x.cpu, c.D), c.runs, means.cpu.slice(2, 1, W));
      on_gpu.pool_runs(heads(x.gpu, c.D), c.runs, means.gpu.slice(2, 1, W));
      EXPECT_LT(means.error(), tolerance(real));

      Twin exact({B, H, W, c.D}, DType::f64);
      on_cpu.pool_runs(heads(x.cpu, c.D), c.runs, exact.cpu);
      on_gpu.pool_runs(heads(x.gpu, c.D), c.runs, exact.gpu);
      const Tensor is = exact.fetch();
      for (int64_t i = 0; i < is.numel(); ++i) {
        ASSERT_NEAR(is.ptr<double>()[i], exact.cpu.ptr<double>()[i], 1e-14);
      }
    }
  }
}

TEST(RunsOnGpu, UnfoldsAndFolds) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.N);
      const int64_t W = c.runs.within(c.N), width = c.runs.length * c.D;
      const Twin x = Twin::normal({B, c.N, (H + 1) * c.D}, real, 1),
                 offset = Twin::normal({c.runs.length, c.D}, real, 2);
      const int64_t count = std::max<int64_t>(1, B * H * W);
      Twin rows({count, width}, real);
      for (const bool moved : {false, true}) {
        if (W == 0) continue;
        on_cpu.unfold_runs(heads(x.cpu, c.D), c.runs, moved ? offset.cpu : Tensor{}, rows.cpu);
        on_gpu.unfold_runs(heads(x.gpu, c.D), c.runs, moved ? offset.gpu : Tensor{}, rows.gpu);
        EXPECT_LT(rows.error(), tolerance(real));
      }
      const Twin drows = Twin::normal({count, width}, real, 3),
                 dmeans = Twin::normal({count, c.D}, real, 4);
      for (const bool both : {false, true}) {
        Twin dx = Twin::zeros({B, c.N, (H + 1) * c.D}, real);
        on_cpu.fold_runs(both ? drows.cpu : Tensor{}, dmeans.cpu, c.runs, heads(dx.cpu, c.D));
        on_gpu.fold_runs(both ? drows.gpu : Tensor{}, dmeans.gpu, c.runs, heads(dx.gpu, c.D));
        EXPECT_LT(dx.error(), tolerance(real));
      }
    }
  }
}

TEST(RunsOnGpu, AddsRowsInAFixedOrder) {
  NEEDS_GPU();
  struct Rows {
    int64_t rows, n;
  };
  for (const DType real : reals) {
    for (const auto [rows, n] : {Rows{1, 8}, Rows{70, 5}, Rows{1024, 130}, Rows{5001, 2048}}) {
      SCOPED_TRACE(rows);
      const Twin x = Twin::normal({rows, n}, real, 1);
      Twin sum = Twin::normal({n}, DType::f32, 2), again = Twin::normal({n}, DType::f32, 2);
      on_cpu.add_rows(x.cpu, sum.cpu);
      on_gpu.add_rows(x.gpu, sum.gpu);
      EXPECT_LT(sum.error(), 1e-5);
      on_gpu.add_rows(x.gpu, again.gpu);
      const Tensor first = sum.fetch(), second = again.fetch();
      EXPECT_EQ(std::memcmp(first.data, second.data, first.bytes()), 0);
    }
  }
}

}  // namespace
}  // namespace entrain
