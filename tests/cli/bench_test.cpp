// `entrain bench` at sizes that take no time: what it prints, what it writes, what it refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/bench_density.h"
#include "tests/program.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"

namespace entrain {
namespace {

const std::string small = " --device cpu --shape B2,Hq4,Hkv2,D16,N256 --chunk 16 --repeats 1 ";

class Bench : public testing::Test {
 protected:
  nlohmann::json attention(const std::string& arguments) {
    const Ended ended = run_entrain("bench attention" + small + arguments + " --json " + json);
    EXPECT_EQ(ended.code, 0) << ended.err;
    printed = ended.out;
    return nlohmann::json::parse(read_file(json));
  }

  TempDir dir;
  const std::string json = dir / "results.json";
  std::string printed;
};

TEST_F(Bench, AttentionHasARowForEachMethodAndDensity) {
  const nlohmann::json results =
      attention("--method dash nsa infllmv2 --density 1 0.5 0.25 --topk 4 --window 32 --sharing 8");
  EXPECT_EQ(results["shape"], "B2,Hq4,Hkv2,D16,N256");
  std::vector<std::string> methods;
  std::vector<double> densities;
  for (const nlohmann::json& row : results["rows"]) {
    methods.push_back(row["method"]);
    densities.push_back(row["density"]);
    EXPECT_NE(printed.find("\n" + methods.back() + " "), printed.npos) << printed;
    const double attention = row["forward_ms"].get<double>() + row["backward_ms"].get<double>();
    EXPECT_GT(attention, 0);
    EXPECT_GE(row["total_ms"].get<double>(), 0.99 * attention);
    EXPECT_GT(row["tflops"].get<double>(), 0);
    EXPECT_GT(row["of_roofline"].get<double>(), 0);
    EXPECT_FALSE(row.contains("of_other"));
    if (methods.back() == "full") continue;
    EXPECT_GE(row["union"].get<double>(), 1);
    EXPECT_LE(row["union"].get<double>(), 32);  // queries of a tile
  }
  EXPECT_EQ(methods,
            (std::vector<std::string>{"full", "engine", "dash", "dash", "nsa", "infllmv2"}));
  EXPECT_EQ(densities[0], 1);
  EXPECT_EQ(densities[1], 1);
  EXPECT_NEAR(densities[2], 0.5, 0.05);
  EXPECT_NEAR(densities[3], 0.25, 0.05);
  EXPECT_EQ(results["rows"][0]["of_full"], 1);
  EXPECT_EQ(results["rows"][1]["routing_forward_ms"], 0);
}

TEST_F(Bench, NeighboursThatShareNothingChooseApart) {
  const auto factor = [&](const std::string& sharing) {
    return attention("--density 0.25 --sharing " + sharing)["rows"][1]["union"].get<double>();
  };
  EXPECT_GT(factor("1"), 1.3 * factor("32"));
}

TEST_F(Bench, AttentionNextToAnotherProgram) {
  const std::string other = dir / "other.json";
  write_file(other, R"({"shape": "B2,Hq4,Hkv2,D16,N256", "forward_ms": 2, "backward_ms": 6})");
  const nlohmann::json row = attention("--density 0.5 --against " + other)["rows"][1];
  EXPECT_DOUBLE_EQ(row["of_other"], row["total_ms"].get<double>() / 8);
  EXPECT_NE(printed.find("of other"), printed.npos);

  for (const auto& [text, says] :
       {std::pair{R"({"shape": "B1,Hq4,Hkv2,D16,N256", "forward_ms": 2, "backward_ms": 6})",
                  "it is about B1,Hq4,Hkv2,D16,N256, not B2,Hq4,Hkv2,D16,N256"},
        {R"({"shape": "B2,Hq4,Hkv2,D16,N256"})", "not the JSON of another program's times"},
        {"", "not the JSON of another program's times"}}) {
    write_file(other, text);
    const Ended ended = run_entrain("bench attention" + small + "--against " + other);
    EXPECT_EQ(ended.code, 1);
    EXPECT_NE(ended.err.find(says), ended.err.npos) << ended.err;
    EXPECT_EQ(std::ranges::count(ended.err, '\n'), 1) << ended.err;
  }
}

TEST_F(Bench, DecodingHasARowForEachBatchAndDensity) {
  const Ended ended = run_entrain(
      "bench decode --device cpu --shape Hq4,Hkv2,D16 --context 200 --chunk 16 --batch 1 3 "
      "--density 0.5 0.25 --repeats 1");
  EXPECT_EQ(ended.code, 0) << ended.err;
  std::istringstream lines(ended.out);
  std::vector<std::string> rows;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string batch, layers, method;
    words >> batch >> layers >> method;
    if (method == "full" || method == "dash") rows.push_back(batch + " " + method);
  }
  EXPECT_EQ(rows,
            (std::vector<std::string>{"1 full", "1 dash", "1 dash", "3 full", "3 dash", "3 dash"}))
      << ended.out;
}

class BenchTrain : public TinyRun {
 protected:
  static std::string line(const std::string& arguments) {
    return ENTRAIN_BINARY
           " bench train --device cpu --n-layer 2 --d-model 32 --n-head 4 --n-kv-head 2 "
           "--head-dim 8 --d-ff 48 --vocab 64 --batch 2 --tokens 128 --chunk 8 --repeats 2 " +
           arguments;
  }
};

TEST_F(BenchTrain, UnderMpirunIsTheStepOfAllRanks) {
  for (const std::string shard : {"", " --shard-optimizer"}) {
    const Ended ended = run(ranks(2, line("--method dash --density 0.4 --json" + shard)));
    ASSERT_EQ(ended.code, 0) << ended.err;
    const Json json = Json::parse(ended.out);  // one rank speaks
    EXPECT_EQ(json["ranks"], 2);
    EXPECT_GT(json["waiting_ms"], 0);
    EXPECT_LT(json["waiting_ms"], json["step_ms"]);
    const double tokens = 2 * 2 * 128;
    EXPECT_NEAR(json["tokens_per_second"].get<double>() * json["step_ms"].get<double>(),
                1000 * tokens, 1);
    EXPECT_NEAR(json["density"], 0.4, 0.05);
  }
}

TEST_F(BenchTrain, RefusesADensityWithoutARouter) {
  expect_refusal(run(ranks(2, line("--method full --density 0.4"))), 2, {"attention full"});
}

TEST_F(Bench, RefusesShapesInOneLine) {
  const std::string form = " is the form\n", whole = "B1,Hq32,Hkv2,D128,N16384" + form;
  for (const auto& [command, shape, says] :
       {std::tuple{"attention", "B1,Hq4,Hkv2,D16", whole},
        {"attention", "B1,Hq4,Hkv2,D16,N0", whole},
        {"attention", "B1,Hq4,Hkv2,D16,N64,N64", whole},
        {"attention", "B1,Hq4,Hkv2,D16,M64", whole},
        {"attention", "B1,Hq4,Hkv2,D16,N64k", whole},
        {"attention", "B1,Hq4,Hkv2,D16,N99999999999999999999", whole},
        {"attention", "B1,Hq4,Hkv3,D16,N64", std::string("Hq must be a multiple of Hkv\n")},
        {"decode", "B1,Hq4,Hkv2,D16,N64", "Hq32,Hkv2,D128" + form},
        {"decode", "Hq4,Hkv2", "Hq32,Hkv2,D128" + form}}) {
    const Ended ended = run_entrain(fmt::format("bench {} --shape {}", command, shape));
    EXPECT_EQ(ended.code, 2);
    EXPECT_EQ(ended.out, "");
    EXPECT_EQ(ended.err.find(fmt::format("entrain: --shape {}: ", shape)), 0) << ended.err;
    EXPECT_TRUE(ended.err.ends_with(says)) << ended.err;
    EXPECT_EQ(std::ranges::count(ended.err, '\n'), 1) << ended.err;
  }
}

TEST(UnionFactor, CountsBlocksOfTilesPerBlockOfAQuery) {
  Pool pool;
  const Tensor mask = pool.make({1, 1, 8, 2}, DType::u64);  // blocks of one key
  uint64_t* words = mask.ptr<uint64_t>();
  for (int64_t i = 0; i < 8; ++i) words[2 * i] = ~uint64_t{0}, words[2 * i + 1] = ~uint64_t{0};
  // Tiles of 2 see 1 + 2, 3 + 4, ... blocks, of which 2, 4, ... are together.
  const double expected = (2 / 1.5 + 4 / 3.5 + 6 / 5.5 + 8 / 7.5) / 4;
  EXPECT_DOUBLE_EQ(cli::union_factor(mask, 1, 2), expected);
  for (int64_t i = 0; i < 8; ++i) words[2 * i] = uint64_t{1} << i;  // each its own
  EXPECT_DOUBLE_EQ(cli::union_factor(mask, 1, 2), 2);
  EXPECT_DOUBLE_EQ(cli::union_factor(mask, 1, 1), 1);
}

TEST(Seek, StopsAtTheTargetOrAsNearAsItGets) {
  double gamma = 0;
  const auto falls = [&] { return std::max(0.1, 1 / (1 + gamma)); };
  EXPECT_NEAR(cli::seek(&gamma, 0.25, falls), 0.25, 0.0025);
  EXPECT_NEAR(gamma, 3, 0.1);
  EXPECT_DOUBLE_EQ(cli::seek(&gamma, 0.05, falls), 0.1);
}

}  // namespace
}  // namespace entrain
