#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

struct Case {
  int64_t T, V, d;
};
// Windows of sorted tokens and their borders, rows that are not aligned, more tokens than are
// sorted at once.
constexpr Case cases[] = {{1, 1, 8},      {256, 4, 16},    {257, 300, 5},
                          {3000, 50, 72}, {1000, 7, 2056}, {70000, 1000, 8}};

/// Half of them one id, as frequent as words get, the others any; but one id where V is 1.
Twin some_tokens(const Case& c) {
  Twin tokens({c.T}, DType::i32);
  Rng rng(5, 0);
  for (int64_t t = 0; t < c.T; ++t) {
    const auto id = static_cast<int64_t>(std::abs(rng.normal()) * 1e6) % c.V;
    tokens.cpu.ptr<int32_t>()[t] = static_cast<int32_t>(rng.normal() > 0 ? id : c.V / 2);
  }
  tokens.send();
  return tokens;
}

TEST(EmbeddingOnGpu, CopiesRows) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      const Twin tokens = some_tokens(c);
      Twin w = Twin::normal({c.V, c.d}, real, 1), y({c.T, c.d}, real);
      on_cpu.embedding(tokens.cpu, w.cpu, y.cpu);
      on_gpu.embedding(tokens.gpu, w.gpu, y.gpu);
      EXPECT_EQ(y.error(), 0) << c.T << " tokens";
    }
  }
}

TEST(EmbeddingOnGpu, SumsGradientsInAFixedOrder) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.T);
      const Twin tokens = some_tokens(c), dy = Twin::normal({c.T, c.d}, real, 2);
      Twin dw = Twin::normal({c.V, c.d}, DType::f32, 3),
           again = Twin::normal({c.V, c.d}, DType::f32, 3);
      on_cpu.embedding_backward(tokens.cpu, dy.cpu, dw.cpu);
      on_gpu.embedding_backward(tokens.gpu, dy.gpu, dw.gpu);
      EXPECT_LT(dw.error(), 1e-5);  // bf16 holds dy exactly, and sums are f32
      on_gpu.embedding_backward(tokens.gpu, dy.gpu, again.gpu);
      const Tensor first = dw.fetch(), second = again.fetch();
      EXPECT_EQ(std::memcmp(first.data, second.data, first.bytes()), 0);
    }
  }
}

TEST(EmbeddingOnGpu, SumsOneIdOnly) {
  NEEDS_GPU();
  constexpr int64_t T = 2000, V = 9, d = 24;
  Twin tokens({T}, DType::i32), dy = Twin::normal({T, d}, DType::bf16, 2);
  std::fill_n(tokens.cpu.ptr<int32_t>(), T, int32_t{V - 1});
  tokens.send();
  Twin dw = Twin::zeros({V, d}, DType::f32);
  on_cpu.embedding_backward(tokens.cpu, dy.cpu, dw.cpu);
  on_gpu.embedding_backward(tokens.gpu, dy.gpu, dw.gpu);
  EXPECT_LT(dw.error(), 1e-5);
}

}  // namespace
}  // namespace entrain
