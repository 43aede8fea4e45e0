#include "train/train_step.h"

#include "tests/train/tiny_step.h"

namespace entrain {
namespace {

TEST(TrainStep, ReportsTheStepItRan) {
  TinyStep tiny("infllmv2");
  double before = 0;
  for (const int number : {1, 2}) {
    const StepResult& result = tiny.run(number);
    EXPECT_NE(result.loss, before);
    before = result.loss;
    ASSERT_EQ(result.read.heads.size(), 2u);
    double sum = 0;
    for (const std::vector<HeadRead>& heads : result.read.heads) {
      ASSERT_EQ(heads.size(), 2u);
      for (const HeadRead& head : heads) sum += head.density;
    }
    EXPECT_NEAR(sum / 4, result.read.all.density, 1e-12);
    EXPECT_GT(result.read.all.density, 0.1);
    EXPECT_LT(result.read.all.density, 1);
  }
}

// The gradients that the step has spoilt say nothing about where: all is run again from none.
TEST(TrainStep, FindsNothingWhereOnlyTheSumOverflowed) {
  TinyStep tiny("full");
  const Tensor grad = tiny.decoder.params().get("model.layers.1.mlp.up_proj.weight").grad;
  grad.ptr<float>()[3] = INFINITY;
  try {
    tiny.run(1);
    FAIL() << "went on";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("value is none when run again"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace entrain
