// entrain generate, on what a run leaves behind.
#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

class Generate : public TinyRun {
 protected:
  static Ended generate(const std::string& arguments) {
    return run(alone(fmt::format("{} generate {}", ENTRAIN_BINARY, arguments)));
  }

  /// The text, of a call that must succeed.
  static std::string text(const std::string& arguments) {
    const Ended ended = generate(arguments);
    EXPECT_EQ(ended.code, 0) << arguments << ": " << ended.err;
    return ended.out;
  }

  /// What the last line on standard error says.
  static double density(const std::string& arguments) {
    const Ended ended = generate(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    const size_t at = ended.err.find("density ");
    EXPECT_NE(at, std::string::npos) << ended.err;
    return std::stod(ended.err.substr(at + 8));
  }
};

TEST_F(Generate, EveryMethodGoesOnWithWhatItLearned) {
  for (const std::string attention :
       {"method=full", "method=dash attention.chunk=4 attention.gamma=1000",
        "method=nsa attention.block=8 attention.topk=3 attention.l=4 "
        "attention.d=2 attention.window=8",
        "method=infllmv2 attention.block=8 attention.topk=3 attention.l=4 attention.d=2"}) {
    const std::string name = attention.substr(7, 3);
    train(name, "attention." + attention + " train.steps=60");
    const std::string out = text((dir / name) + " --prompt 'sparse ' --tokens 60 --temperature 0");
    EXPECT_EQ(out.size(), 60u);
    const size_t strange = out.find_first_not_of("sparse attention reads what it needs.\n");
    EXPECT_EQ(strange, std::string::npos) << attention << ": " << out;
    const double read = density((dir / name) + " --prompt 'sparse ' --tokens 60");
    EXPECT_GT(read, 0.1);
    EXPECT_LE(read, 1);
    EXPECT_EQ(read < 1, name != "ful") << attention;
  }
}

TEST_F(Generate, TakesAnotherAttention) {
  train("dash", "attention.method=dash attention.chunk=2 attention.target_density=0.4");
  const std::string call = (dir / "dash") + " --prompt sparse --tokens 30 --temperature 0 ";
  EXPECT_EQ(density(call + "attention.method=full"), 1);
  EXPECT_EQ(text(call + "attention.method=full"), text(call + "attention.local_blocks=1000"));
  EXPECT_LT(density(call), 1);
}

TEST_F(Generate, TheSeedDecidesTheText) {
  train("run", "train.steps=2");
  const std::string call = (dir / "run") + " --prompt sparse --tokens 50 --top-p 1 --temperature ";
  EXPECT_EQ(text(call + "1 --seed 3"), text(call + "1 --seed 3"));
  EXPECT_NE(text(call + "1 --seed 3"), text(call + "1 --seed 4"));
  EXPECT_EQ(text(call + "0 --seed 3"), text(call + "0 --seed 4"));
  EXPECT_EQ(text(call + "1e-9"), text(call + "0"));
}

TEST_F(Generate, TakesPromptsFromAnywhere) {
  train("run", "train.steps=2");
  const std::string rest = (dir / "run") + " --tokens 20 --temperature 0 ";
  write_file(dir / "prompt", "sparse attention\n");
  const std::string expected = text(rest + "--prompt $'sparse attention\\n'");
  EXPECT_EQ(text(rest + "<" + (dir / "prompt")), expected);
  EXPECT_EQ(expected.find("sparse attention\n"), std::string::npos) << "the prompt is not repeated";
  EXPECT_EQ(text(rest + "</dev/null"), text(rest + "--prompt ''")) << "a new document";
  const std::string file = checkpoint("run", 2);
  EXPECT_EQ(text(file + " --tokens 20 --temperature 0 <" + (dir / "prompt")), expected);
  EXPECT_FALSE(text(rest + "--prompt $'\\xff\\xe2\\x96'").empty()) << "bytes that are not UTF-8";
}

TEST_F(Generate, EndsWithTheDocument) {
  // Documents of two letters: the end of a document is soon the likeliest byte.
  const Tokenizer tokenizer;
  TokenWriter writer(dir / "short.h5", tokenizer.vocab());
  for (int d = 0; d < 400; ++d) {
    const std::vector<int32_t> ids{'a', 'b', tokenizer.end_of_document()};
    writer.add(d % 2 ? Split::train : Split::validation, ids);
  }
  writer.finish({tokenizer.name(), "", R"({"files": 1})", ""});
  train("short", "data.path=" + (dir / "short.h5") + " train.steps=60");
  const Ended ended = generate((dir / "short") + " --prompt '' --tokens 50 --temperature 0");
  EXPECT_EQ(ended.out, "ab");
  EXPECT_NE(ended.err.find("2 tokens to the end of the document"), std::string::npos) << ended.err;
}

TEST_F(Generate, TakesGammaAsTrainingLeftIt) {
  train("run",
        "attention.method=dash attention.chunk=2 attention.target_density=0.4 train.steps=30");
  const CheckpointInfo info = read_info(checkpoint("run", 30));
  const double gamma = info.state.controller.at("gamma");
  ASSERT_GT(std::abs(gamma - 1), 0.1) << "the controller did not move it";
  const std::string call = (dir / "run") + " --prompt sparse --tokens 100 --temperature 0 ";
  const double trained = density(call);
  EXPECT_EQ(density(call + fmt::format("attention.gamma={:.17g}", gamma)), trained);
  EXPECT_NE(density(call + "attention.gamma=0.01"), trained);
}

TEST_F(Generate, StreamsTextAsItIsMade) {
  train("run", "train.steps=40");
  const std::string call = " --prompt sparse --tokens 200000 --temperature 0 >";
  Program program(
      alone(fmt::format("{} generate {}{}{}", ENTRAIN_BINARY, dir / "run", call, dir / "text")));
  uintmax_t bytes = 0;
  for (int i = 0; i < 60000 && bytes == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (std::filesystem::exists(dir / "text")) bytes = std::filesystem::file_size(dir / "text");
  }
  EXPECT_GT(bytes, 0u);
  EXPECT_LT(bytes, 4096u) << "buffered";
  program.kill_all();
  EXPECT_EQ(program.wait().code, 128 + SIGKILL) << "it was at its end";
}

TEST_F(Generate, RefusesInOneLine) {
  train("run", "train.steps=2");
  const std::string folder = dir / "run";
  const auto call = [&](const std::string& more) {
    return generate(folder + " --prompt a " + more);
  };
  expect_refusal(call("--temperature -1"), 2, {"--temperature is -1"});
  expect_refusal(call("--temperature nan"), 2, {"--temperature is nan"});
  expect_refusal(call("--top-p 0"), 2, {"--top-p is 0"});
  expect_refusal(call("--top-p 1.5"), 2, {"--top-p is 1.5"});
  expect_refusal(call("--tokens 0"), 2, {"--tokens must be at least 1"});
  expect_refusal(call("--tokens many"), 2, {"--tokens"});
  expect_refusal(call("--tokens 9000000000000000000"), 2, {"ask for fewer"});
  expect_refusal(call("attention.gama=1"), 2, {"gamma"});
  expect_refusal(generate((dir / "none") + " --prompt a"), 1, {dir / "none"});
  expect_refusal(generate((dir / "tokens.h5") + " --prompt a"), 1, {"not a checkpoint"});
  expect_refusal(call("data.path=" + (dir / "none.h5")), 1, {dir / "none.h5"});
  expect_refusal(call("model.d_ff=40"), 1, {"mlp"});
  const std::string bytes = read_file(checkpoint("run", 2));
  write_file(checkpoint("run", 2), bytes.substr(0, bytes.size() / 2));
  expect_refusal(generate(checkpoint("run", 2) + " --prompt a"), 1, {checkpoint("run", 2)});
  const Ended skipped = call("");
  EXPECT_EQ(skipped.code, 1);
  EXPECT_NE(skipped.err.find("all checkpoints in " + folder), std::string::npos) << skipped.err;
}

TEST_F(Generate, SaysWhenTextCannotBeWritten) {
  train("run", "train.steps=2");
  expect_refusal(generate((dir / "run") + " --prompt a >/dev/full"), 1, {"standard output"});
}

}  // namespace
}  // namespace entrain
