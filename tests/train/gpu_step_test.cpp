// Training on the GPU against training on the CPU, from the same seed.
#include "tests/kernels/gpu.h"
#include "tests/train/tiny_step.h"

namespace entrain {
namespace {

constexpr int steps = 100;

std::vector<double> losses_of(TinyStep&& tiny) {
  std::vector<double> losses;
  for (int step = 1; step <= steps; ++step) losses.push_back(tiny.run(step).loss);
  return losses;
}

class GpuStep : public testing::TestWithParam<const char*> {};

TEST_P(GpuStep, LearnsAsTheCpuDoes) {
  NEEDS_GPU();
  const std::vector<double> cpu = losses_of(TinyStep(GetParam()));
  const std::vector<double> f32 = losses_of(TinyStep(GetParam(), false, Device::cuda));
  const std::vector<double> bf16 =
      losses_of(TinyStep(GetParam(), false, Device::cuda, DType::bf16));
  EXPECT_LT(cpu.back(), 0.5 * cpu.front()) << "nothing was learned";
  for (size_t i = 0; i < steps; ++i) EXPECT_NEAR(f32[i], cpu[i], 1e-3 * cpu[i]) << "step " << i + 1;
  EXPECT_NEAR(bf16.back(), cpu.back(), 1e-2 * cpu.back());
}

TEST_P(GpuStep, RepeatsBitwiseAlsoRecomputed) {
  NEEDS_GPU();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const auto run = [&](bool recompute) {
      return losses_of(TinyStep(GetParam(), recompute, Device::cuda, dtype));
    };
    const std::vector<double> once = run(false);
    EXPECT_EQ(run(false), once) << name_of(dtype);
    EXPECT_EQ(run(true), once) << name_of(dtype);
  }
}

TEST_P(GpuStep, NamesTheOpThatIsNotFinite) {
  NEEDS_GPU();
  TinyStep tiny(GetParam(), false, Device::cuda, DType::bf16);
  tiny.run(1);
  Mirror weight(tiny.decoder.params().get("model.layers.1.mlp.down_proj.weight").value);
  weight.download();
  weight.host().ptr<float>()[3] = NAN;
  weight.upload();
  tiny.decoder.params().round();
  try {
    tiny.run(2);
    FAIL() << "went on";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("layers.1.add_linear (forward)"), std::string::npos)
        << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, GpuStep, testing::Values("full", "dash", "nsa", "infllmv2"));

}  // namespace
}  // namespace entrain
