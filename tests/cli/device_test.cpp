// --device, run.device and run.dtype: what cannot be had is refused in one line, before anything is
// left behind.
#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

class DeviceOption : public TinyRun {
 protected:
  /// As on a machine without a GPU, whatever this one has.
  void expect_refused(const std::string& arguments, const std::vector<std::string>& parts,
                      int count = 0) {
    const std::string program = fmt::format("{} {}", ENTRAIN_BINARY, arguments);
    const std::string line = count ? ranks(count, program) : alone(program);
    const Ended ended = run("export CUDA_VISIBLE_DEVICES=; " + line);
    expect_refusal(ended, 2, parts);
    EXPECT_EQ(ended.out, "") << arguments;
    if (count > 0) return;  // mpirun adds lines of its own
    EXPECT_EQ(std::ranges::count(ended.err, '\n'), 1) << ended.err;
  }
  std::string train_on(const std::string& arguments) const {
    return fmt::format("train {} {}", dir / "run.yaml", arguments);
  }
  std::string op(const std::string& arguments) const {
    return fmt::format("op full --in {}/full.h5 --out {} {}", TEST_VECTORS, dir / "out.h5",
                       arguments);
  }
};

const std::string no_gpu = "no GPU to compute on: ";

TEST_F(DeviceOption, TrainingWantsAGpuThatIsNotThere) {
  for (const int count : {0, 2}) {
    for (const char* device : {"--device cuda", "run.device=cuda"}) {
      expect_refused(train_on(device), {no_gpu, "cpu or auto"}, count);
    }
    expect_refused(train_on("run.dtype=bf16"), {"run.dtype bf16", "f32 or auto"}, count);
  }
  EXPECT_FALSE(std::filesystem::exists(dir / "run"));
}

TEST_F(DeviceOption, StudiesWantAGpuThatIsNotThere) {
  std::string yaml = read_file(TEST_VECTORS "/../train/tiny_study.yaml");
  for (const auto& [part, by] : {std::pair{"dir: study", "dir: " + (dir / "study")},
                                 {"path: tokens.h5", "path: " + (dir / "tokens.h5")},
                                 {"device: cpu", std::string("device: cuda")}}) {
    const size_t at = yaml.find(part);
    ASSERT_NE(at, yaml.npos) << part;
    yaml.replace(at, std::string(part).size(), by);
  }
  write_file(dir / "study.yaml", yaml);
  for (const int count : {0, 2}) expect_refused("sweep " + (dir / "study.yaml"), {no_gpu}, count);
  EXPECT_FALSE(std::filesystem::exists(dir / "study"));
}

TEST_F(DeviceOption, OtherCommandsWantAGpuThatIsNotThere) {
  train("run", "train.steps=1");
  for (const std::string command : {"eval ", "generate --prompt a "}) {
    expect_refused(command + (dir / "run --device cuda"), {no_gpu});
    expect_refused(command + (dir / "run run.dtype=bf16"), {"run.dtype bf16"});
  }
  expect_refused("bench train --device cuda", {no_gpu});
  expect_refused("bench attention --device cuda", {no_gpu});
  expect_refused(op("--device cuda"), {no_gpu});
  EXPECT_FALSE(std::filesystem::exists(dir / "out.h5"));
}

TEST_F(DeviceOption, TypesThatTheCpuDoesNotHave) {
  for (const char* device : {"--device cpu", ""}) {
    expect_refused(op(fmt::format("--dtype bf16 {}", device)), {"--dtype bf16 is the GPU's"});
  }
  expect_refused(op("--dtype f16"), {"--dtype: f16 not in {f64,f32,bf16}"});
  EXPECT_FALSE(std::filesystem::exists(dir / "out.h5"));
}

TEST_F(DeviceOption, UnknownNames) {
  const std::string unknown = "--device: gpu not in {auto,cpu,cuda}";
  for (const std::string& command :
       {train_on(""), std::string("bench train"), std::string("bench attention"), op(""),
        "eval " + (dir / "")}) {
    expect_refused(command + " --device gpu", {unknown});
  }
  expect_refused(train_on("run.device=gpu"), {"run.device must be auto or cpu or cuda, not 'gpu'"});
  expect_refused(train_on("run.dtype=f16"), {"run.dtype must be auto or f32 or bf16, not 'f16'"});
}

TEST_F(DeviceOption, ARunWithoutAGpuTakesTheCpu) {
  const Ended ended = run("export CUDA_VISIBLE_DEVICES=; " +
                          alone(train_line("run", "run.device=auto run.dtype=auto train.steps=1")));
  EXPECT_EQ(ended.code, 0) << ended.err;
}

}  // namespace
}  // namespace entrain
