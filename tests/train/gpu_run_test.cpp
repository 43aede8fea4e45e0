// Runs of the program on a GPU: the CPU's numbers in f32, near them in bf16, and bitwise the same
// again, stopped or not.
#include "tests/kernels/gpu.h"
#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

class GpuRun : public TinyRun {
 protected:
  static std::string on_gpu(const std::string& method, const std::string& dtype) {
    return fmt::format(
        "run.device=cuda run.dtype={} attention.method={} checkpoint.every=6 "
        "train.schedule=constant ",
        dtype, method);
  }
};

const std::vector<std::string> methods = {
    "full", "dash", "nsa attention.l=8 attention.d=4 attention.block=8 attention.topk=3",
    "infllmv2 attention.l=8 attention.d=4 attention.block=8 attention.topk=3"};

TEST_F(GpuRun, TrainsAsTheCpuDoes) {
  NEEDS_GPU();
  for (const std::string& method : methods) {
    std::filesystem::remove_all(dir / "gpu");
    std::filesystem::remove_all(dir / "cpu");
    std::filesystem::remove_all(dir / "bf16");
    train("cpu", "train.schedule=constant attention.method=" + method);
    train("gpu", on_gpu(method, "f32"));
    expect_near_steps(dir / "gpu", dir / "cpu", 1e-4);
    train("bf16", on_gpu(method, "bf16"));
    const double narrow = read_steps(dir / "bf16").back()["loss"];
    const double wide = read_steps(dir / "cpu").back()["loss"];
    EXPECT_NEAR(narrow, wide, 0.02 * wide) << method;
  }
}

TEST_F(GpuRun, RepeatsAndResumesToTheLastBit) {
  NEEDS_GPU();
  for (const std::string& method : methods) {
    for (const char* name : {"whole", "again", "parts"}) std::filesystem::remove_all(dir / name);
    const std::string arguments = on_gpu(method, "bf16");
    train("whole", arguments);
    train("again", arguments);
    train("parts", arguments + "train.steps=6");
    train("parts", arguments + "--resume");
    for (const char* name : {"again", "parts"}) {
      expect_same_steps(dir / name, dir / "whole");
      expect_same_checkpoints(checkpoint(name, 12), checkpoint("whole", 12));
    }
  }
}

TEST_F(GpuRun, IsEvaluatedOnEitherDevice) {
  NEEDS_GPU();
  train("run", on_gpu("dash", "f32") + "train.steps=6");
  const Json gpu = evaluate(dir / "run"), cpu = evaluate((dir / "run") + " --device cpu");
  EXPECT_NEAR(gpu["loss"].get<double>(), cpu["loss"].get<double>(), 1e-4);
  const Ended text = run(
      alone(fmt::format("{} generate {} --prompt sparse --tokens 8", ENTRAIN_BINARY, dir / "run")));
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_FALSE(text.out.empty());
}

}  // namespace
}  // namespace entrain
