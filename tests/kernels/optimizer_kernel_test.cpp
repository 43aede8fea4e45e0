#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

double squares_of(Twin& squares) {
  return *squares.fetch().ptr<double>();
}

TEST(OptimizerOnGpu, SumsSquaresInAFixedOrder) {
  NEEDS_GPU();
  for (const int64_t n : {1, 5, 1003, 3000001}) {
    SCOPED_TRACE(n);
    Twin squares({1}, DType::f64);
    const Twin x = Twin::normal({n}, DType::f32, 1);
    const auto both = [&](int64_t begin) {
      on_cpu.sum_of_squares(x.cpu.slice(0, begin, n - begin), squares.cpu);
      on_gpu.sum_of_squares(x.gpu.slice(0, begin, n - begin), squares.gpu);
      EXPECT_NEAR(squares_of(squares), *squares.cpu.ptr<double>(),
                  1e-12 * *squares.cpu.ptr<double>());
    };
    both(0);
    const double once = squares_of(squares);
    on_gpu.sum_of_squares(x.gpu, squares.gpu);
    EXPECT_EQ(squares_of(squares), once);
    both(1);  // not aligned; nothing where n is 1
  }
}

struct State {
  explicit State(int64_t n)
      : w(Twin::normal({n}, DType::f32, 1)),
        g(Twin::normal({n}, DType::f32, 2)),
        m(Twin::zeros({n}, DType::f32)),
        v(Twin::zeros({n}, DType::f32)),
        rounded({n}, DType::bf16),
        decays({n}, DType::u8),
        squares({1}, DType::f64) {
    for (int64_t i = 0; i < n; ++i) decays.cpu.ptr<uint8_t>()[i] = i % 3 == 0;
    decays.send();
  }
  void step_on_gpu(const AdamW& adamw, Tensor to) const {
    on_gpu.sum_of_squares(g.gpu, squares.gpu);
    on_gpu.adamw(w.gpu, g.gpu, m.gpu, v.gpu, decays.gpu, squares.gpu, adamw, to);
  }

  Twin w, g, m, v, rounded, decays, squares;
};

TEST(OptimizerOnGpu, AdamWTakesTheCpusSteps) {
  NEEDS_GPU();
  for (const int64_t n : {1, 6, 1003, 300000}) {
    for (const double clip : {0.0, 0.5, 1e9}) {
      SCOPED_TRACE(n);
      State s(n);
      Pinned numbers({3}, DType::f64);
      const double* lr_c1_c2 = numbers.host().ptr<double>();
      const AdamW adamw{.clip = clip, .lr_c1_c2 = lr_c1_c2};
      for (int step = 1; step <= 3; ++step) {
        const double now[] = {0.01 / step, 1 - std::pow(adamw.beta1, step),
                              1 - std::pow(adamw.beta2, step)};
        std::copy_n(now, 3, numbers.host().ptr<double>());
        on_cpu.sum_of_squares(s.g.cpu, s.squares.cpu);
        on_cpu.adamw(s.w.cpu, s.g.cpu, s.m.cpu, s.v.cpu, s.decays.cpu, s.squares.cpu, adamw, {});
        s.step_on_gpu(adamw, s.rounded.gpu);
        EXPECT_EQ(s.g.error(), 0);  // cleared
        Rng rng(7, static_cast<uint64_t>(step));
        for (int64_t i = 0; i < n; ++i) {
          s.g.cpu.ptr<double>()[i] = static_cast<float>(rng.normal());
        }
        s.g.send();
      }
      EXPECT_LT(s.w.error(), 1e-5);
      EXPECT_LT(s.m.error(), 1e-5);
      EXPECT_LT(s.v.error(), 1e-5);
      copy(s.w.cpu, s.rounded.cpu);
      EXPECT_LT(s.rounded.error(), 1e-2);
    }
  }
}

TEST(OptimizerOnGpu, NothingChangesWhereTheNormIsNotFinite) {
  NEEDS_GPU();
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    State s(100);
    s.g.cpu.ptr<double>()[41] = bad;
    s.g.send();
    Pinned numbers({3}, DType::f64);
    std::fill_n(numbers.host().ptr<double>(), 3, 0.5);
    s.step_on_gpu({.clip = 1, .lr_c1_c2 = numbers.host().ptr<double>()}, {});
    for (Twin* t : {&s.w, &s.m, &s.v}) EXPECT_EQ(t->error(), 0);
    const Tensor g = s.g.fetch();
    for (int64_t i = 0; i < 100; ++i) {
      const double is = g.ptr<float>()[i], was = s.g.cpu.ptr<double>()[i];
      EXPECT_TRUE(is == was || (std::isnan(is) && std::isnan(was))) << i;
    }
  }
}

}  // namespace
}  // namespace entrain
