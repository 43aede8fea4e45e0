// entrain sweep: whole studies of a tiny model, stopped, killed, failing and refused.
#include <cmath>
#include <map>
#include <random>

#include "tests/train/tiny_run.h"
#include "train/study.h"

namespace entrain {
namespace {

using Names = std::vector<std::string>;

class Sweep : public TinyRun {
 protected:
  Sweep() { write_file(dir / "study.yaml", yaml); }

  /// Sets the study file to the tiny study with one part replaced.
  void change(const std::string& part, const std::string& by) {
    const size_t at = yaml.find(part);
    ASSERT_NE(at, yaml.npos) << part;
    yaml.replace(at, part.size(), by);
    write_file(dir / "study.yaml", yaml);
  }
  void from_scratch() {
    const size_t begin = yaml.find("dense: "), end = yaml.find('\n', begin) + 1;
    change(yaml.substr(begin, end - begin), "");
    change("continued", "scratch");
  }

  std::string line(int count = 0) const {
    const std::string program =
        count ? fmt::format("{} -np {} {}", MPIEXEC, count, ENTRAIN_BINARY) : ENTRAIN_BINARY;
    return environment() + fmt::format("cd {}; exec {} sweep study.yaml", dir / "", program);
  }
  Ended sweep(int count = 0) const { return run(line(count)); }
  void complete(int count = 0) const {
    const Ended ended = sweep(count);
    ASSERT_EQ(ended.code, 0) << ended.err << ended.out;
    EXPECT_EQ(ended.err, "");
  }

  Study study() const { return read_study(yaml, "study.yaml"); }
  std::string folder(const std::string& name) const { return dir / "study/runs/" + name; }
  Json result(const std::string& name) const {
    return Json::parse(read_file(folder(name) + "/result.json"));
  }

  /// Every file under the study's folder: when it was written, and what it holds.
  std::map<std::string, std::string> snapshot() const {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(dir / "study")) {
      const auto written = entry.last_write_time().time_since_epoch().count();
      files[entry.path()] = std::to_string(written);
      if (entry.is_regular_file()) files[entry.path()] += read_file(entry.path());
    }
    return files;
  }

  void expect_unchanged(const std::map<std::string, std::string>& before) const {
    EXPECT_TRUE(snapshot() == before);
  }

  void expect_refused(const std::vector<std::string>& parts, int code = 2) {
    for (const int count : {0, 2}) expect_refusal(sweep(count), code, parts);
  }

  /// `entrain train` and `entrain eval` on the study's runs, each on its own, into dir/alone.
  void expect_as_one_by_one(int count = 0) {
    for (StudyRun run : study().runs) {
      run.config.dir = dir / "alone/" + run.name;
      run.config.data.path = dir / "tokens.h5";
      if (!run.init_from.empty()) run.config.train.init_from = dir / "alone/" + run.init_from;
      write_file(dir / "alone.yaml", to_yaml(run.config));
      const std::string command = fmt::format("{} train {}", ENTRAIN_BINARY, dir / "alone.yaml");
      ASSERT_EQ(TinyRun::run(count ? ranks(count, command) : alone(command)).code, 0);
      expect_same_steps(folder(run.name), run.config.dir);
      const int64_t last = run.config.train.steps;
      expect_same_checkpoints(checkpoint("study/runs/" + run.name, last),
                              checkpoint("alone/" + run.name, last));
      Json expected = evaluate(run.config.dir, count), eval = result(run.name)["eval"];
      for (const char* key : {"method", "step", "tokens_per_second"}) expected.erase(key);
      eval.erase("tokens_per_second");
      EXPECT_EQ(eval, expected) << run.name;
    }
  }

  /// On the CPU, also where auto would be a GPU.
  static std::string tiny_study() {
    std::string study = read_file(TEST_VECTORS "/../train/tiny_study.yaml");
    return study.insert(study.find("dense: "), "  run: {device: cpu}\n");
  }

  std::string yaml = tiny_study();
};

TEST_F(Sweep, ContinuedGivesWhatItsRunsGiveOneByOne) {
  complete();
  EXPECT_EQ(files_in(dir / "study"), (Names{"results.csv", "results.h5", "runs"}));
  EXPECT_EQ(files_in(folder("full-seed1")),
            (Names{"checkpoints", "config.yaml", "metrics.jsonl", "result.json"}));
  expect_as_one_by_one();
}

TEST_F(Sweep, FromScratchGivesWhatItsRunsGiveOneByOne) {
  from_scratch();
  complete();
  expect_as_one_by_one();
  // The same weights and tokens: what differs is what was read.
  EXPECT_NEAR(read_steps(folder("full-seed1"))[0]["loss"],
              read_steps(folder("dash-target_density0.5-seed1"))[0]["loss"], 0.01);
}

TEST_F(Sweep, TwoRanksGiveWhatTwoRanksGive) {
  change("[1, 2]", "[1]");
  complete(2);
  expect_as_one_by_one(2);
  EXPECT_EQ(result("full-seed1")["ranks"], 2);
}

TEST_F(Sweep, ContinuedRunsSeeTheTokensAfterTheDenseRuns) {
  change("lr: 3.0e-3", "lr: 1.0e-30");
  change("train.lr: 1.0e-2", "train.lr: 1.0e-30");
  complete();
  // With weights that stay, a step's loss tells its tokens: those of a run that goes on.
  train("long", "train.steps=14 train.global_batch=4 train.lr=1.0e-30");
  const std::vector<Json> whole = read_steps(dir / "long");
  const std::vector<Json> dense = read_steps(folder("dense-seed1")),
                          full = read_steps(folder("full-seed1"));
  ASSERT_EQ(dense.size() + full.size(), whole.size());
  for (size_t i = 0; i < whole.size(); ++i) {
    const Json& step = i < 6 ? dense[i] : full[i - 6];
    EXPECT_NEAR(step["loss"], whole[i]["loss"], 1e-5) << i;
  }
  EXPECT_EQ(full.back()["tokens"], 8 * 4 * 64) << "its own only";
}

std::vector<double> values(const h5::File& file, const std::string& name) {
  std::vector<double> values(static_cast<size_t>(file.shape(name).numel()));
  file.read(name, Tensor::of(values.data(), file.shape(name), DType::f64));
  return values;
}

TEST_F(Sweep, WritesResultsThatExplainThemselves) {
  complete();
  const h5::File file = h5::File::open(dir / "study/results.h5");
  EXPECT_EQ(file.text("", "format"), "entrain study 1");
  EXPECT_EQ(file.text("", "protocol"), "continued");
  EXPECT_EQ(file.text("", "study"), yaml);
  EXPECT_EQ(file.text("", "code_version").substr(0, 2), "0.");
  ASSERT_EQ(file.groups("runs").size(), 8u);
  std::istringstream csv(read_file(dir / "study/results.csv"));
  std::string row;
  std::getline(csv, row);
  EXPECT_EQ(row,
            "run,varied,method,role,seed,init_from,ranks,code_version,seq_len,steps,train_tokens,"
            "loss,perplexity,density,router_density,active_blocks,train_tokens_per_second,"
            "eval_tokens_per_second,wall_seconds,peak_memory_bytes,attention_ms,routing_entropy,"
            "answers,recall_accuracy");
  for (const StudyRun& run : study().runs) {
    const std::string group = "runs/" + run.name;
    const std::vector<Json> steps = read_steps(folder(run.name));
    const Json eval = result(run.name)["eval"];
    EXPECT_EQ(file.text(group, "method"), run.config.attention.method);
    EXPECT_EQ(file.text(group, "role"), run.dense ? "dense" : "compared");
    EXPECT_EQ(file.text(group, "varied"), run.varied.dump());
    EXPECT_EQ(file.text(group, "config"), read_file(folder(run.name) + "/config.yaml"));
    EXPECT_EQ(file.text(group, "init_from"), run.init_from);
    EXPECT_EQ(file.integer(group, "seed"), int64_t(run.config.train.seed));
    EXPECT_EQ(file.integer(group, "ranks"), 1);
    EXPECT_EQ(file.integer(group, "seq_len"), 64);
    EXPECT_EQ(file.integer(group, "steps"), run.config.train.steps);
    EXPECT_EQ(file.integer(group, "train_tokens"), run.config.train.steps * 4 * 64);
    EXPECT_GT(file.integer(group, "peak_memory_bytes"), 1 << 20);
    for (const char* key : {"loss", "perplexity", "density", "router_density", "active_blocks"}) {
      EXPECT_EQ(file.number(group, key), double(eval[key])) << key;
    }
    EXPECT_EQ(file.number(group, "eval_tokens_per_second"), double(eval["tokens_per_second"]));

    std::vector<double> rates, attention;
    double seconds = 0;
    for (const Json& step : steps) {
      rates.push_back(step["tokens_per_second"]);
      attention.push_back(step["attention_seconds"]);
    }
    for (const Json& line : read_metrics(folder(run.name))) seconds += double(line["seconds"]);
    const auto median = [](std::vector<double> v) {
      std::ranges::sort(v);
      return (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;  // of an even number
    };
    EXPECT_DOUBLE_EQ(file.number(group, "train_tokens_per_second"), median(rates));
    EXPECT_DOUBLE_EQ(file.number(group, "wall_seconds"), seconds);
    EXPECT_DOUBLE_EQ(file.number(group, "attention_ms"), median(attention) * 1000 / 4);

    EXPECT_EQ(values(file, group + "/training/tokens_per_second"), rates);
    const std::vector<double> loss = values(file, group + "/training/loss");
    ASSERT_EQ(loss.size(), steps.size());
    EXPECT_EQ(loss.back(), double(steps.back()["loss"]));
    EXPECT_EQ(values(file, group + "/training/step").back(), double(run.config.train.steps));
    EXPECT_EQ(values(file, group + "/training/density").back(), double(steps.back()["density"]));

    EXPECT_EQ(file.shape(group + "/eval/loss_by_position"), (Shape{16, 3}));
    EXPECT_EQ(file.text(group + "/eval/loss_by_position", "columns"), "begin, end, loss");
    const Json& position = eval["loss_by_position"][5];
    const std::vector<double> by_position = values(file, group + "/eval/loss_by_position");
    EXPECT_EQ(std::vector<double>(by_position.begin() + 15, by_position.begin() + 18),
              (std::vector<double>{position["begin"], position["end"], position["loss"]}));
    for (const char* key : {"density", "router_density", "active_blocks"}) {
      EXPECT_EQ(file.shape(group + "/eval/" + key), (Shape{2, 2}));
      EXPECT_EQ(values(file, group + "/eval/" + key)[1], double(eval["layers"][0][1][key]));
    }

    ASSERT_TRUE(std::getline(csv, row));
    std::string quoted;
    for (const char c : run.varied.dump()) quoted.append(c == '"' ? 2 : 1, c);
    if (quoted != "{}") quoted = fmt::format("\"{}\"", quoted);
    const std::string start =
        fmt::format("{},{},{},{},{},{},1,", run.name, quoted, run.config.attention.method,
                    run.dense ? "dense" : "compared", run.config.train.seed, run.init_from);
    EXPECT_EQ(row.substr(0, start.size()), start);
    EXPECT_NE(row.find(',' + eval["loss"].dump() + ','), std::string::npos) << row;
    EXPECT_TRUE(row.ends_with(",,")) << "there are no answers to ask for: " << row;
    ASSERT_EQ(file.has(group + "/eval/routing"), eval.contains("routing"));
    ASSERT_EQ(eval.contains("routing"), run.config.attention.method == "dash");
    if (!eval.contains("routing")) continue;
    EXPECT_EQ(file.number(group, "routing_entropy"), double(eval["routing_entropy"]));
    const Json& routing = eval["routing"].back();
    const std::vector<double> table = values(file, group + "/eval/routing");
    EXPECT_EQ(std::vector<double>(table.end() - 5, table.end()),
              (std::vector<double>{routing["begin"], routing["end"], routing["candidates"],
                                   routing["entropy"], routing["softmax_entropy"]}));
  }
  EXPECT_FALSE(std::getline(csv, row));
}

TEST_F(Sweep, IsDrawnAndReported) {
  if (run("/usr/bin/python3 -c 'import h5py, matplotlib'").code != 0) {
    GTEST_SKIP() << "/usr/bin/python3 lacks h5py or matplotlib";
  }
  complete();
  const auto tool = [&](const std::string& arguments) {
    const Ended ended = run("PYTHONDONTWRITEBYTECODE=1 exec " TOOLS "/" + arguments);
    EXPECT_EQ(ended.code, 0) << ended.err << ended.out;
    return ended.out;
  };
  const auto expect_part = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text.substr(0, 4000) << "\nlacks: " << part;
  };
  const std::string plotted = tool("plot " + dir / "study");
  tool("report " + dir / "study");
  const std::string report = read_file(dir / "study/report.html");
  for (const char* setting :
       {"before: full attention", "full attention", "DashAttention, target_density 0.5",
        "DashAttention, target_density 0.4"}) {
    expect_part(plotted, fmt::format("\n{} ", setting));
    expect_part(report, fmt::format("<th scope=\"row\">{}</th>", setting));
  }
  EXPECT_EQ(plotted.find("no figure"), std::string::npos) << plotted;
  EXPECT_GT(std::filesystem::file_size(dir / "study/figures/sparsity.png"), 0u);
  expect_part(report, "<figure id=\"sparsity\">");

  // One of its runs alone, which has no results.h5.
  const std::string alone = tool("plot " + folder("dash-target_density0.5-seed1"));
  expect_part(alone, "attention ms");
  expect_part(alone, "\nDashAttention ");
}

TEST_F(Sweep, ChangesNothingWhenAllIsDone) {
  complete();
  const auto before = snapshot();
  for (const int count : {0, 2}) {
    const Ended again = sweep(count);
    EXPECT_EQ(again.code, 0) << again.err;
    EXPECT_NE(again.out.find("study study: 8 of 8 runs done"), std::string::npos) << again.out;
    expect_unchanged(before);
  }
  // With nothing left to train, nothing to train on is needed.
  std::filesystem::remove(dir / "tokens.h5");
  EXPECT_EQ(sweep().code, 0);
  expect_unchanged(before);
}

TEST_F(Sweep, GrowsWithItsGridAndLeavesOutWhatItNoLongerHas) {
  complete();
  const Json before = result("full-seed1");
  const std::string metrics = read_file(folder("full-seed1") + "/metrics.jsonl");
  change("- {attention.method: full}", "- {attention.method: full}\n  - {attention.gamma: 2}");
  change("[0.5, 0.4]", "0.5");
  complete();
  EXPECT_EQ(result("full-seed1"), before);
  EXPECT_EQ(read_file(folder("full-seed1") + "/metrics.jsonl"), metrics);
  const h5::File file = h5::File::open(dir / "study/results.h5");
  EXPECT_EQ(file.groups("runs").size(), 8u);
  EXPECT_TRUE(file.has("runs/full-gamma2-seed2"));
  EXPECT_FALSE(file.has("runs/dash-target_density0.4-seed1"));
  EXPECT_TRUE(std::filesystem::exists(folder("dash-target_density0.4-seed1") + "/result.json"));
  EXPECT_EQ(file.text("", "study"), yaml);
}

TEST_F(Sweep, GoesOnAfterBeingKilledAtAnyMoment) {
  for (const char* protocol : {"continued", "scratch"}) {
    if (protocol == std::string("scratch")) from_scratch();
    std::filesystem::remove_all(dir / "alone");
    std::filesystem::remove_all(dir / "study");
    std::random_device entropy;
    Rng rng(entropy(), 0);
    size_t kills = 0, done = 0;
    for (bool complete = false; !complete && kills < 40;) {
      Program program(line());
      std::this_thread::sleep_for(std::chrono::milliseconds(150 + rng.below(500)));
      program.kill_all();
      const Ended ended = program.wait();
      complete = ended.code == 0;
      ASSERT_TRUE(complete || ended.code == 128 + SIGKILL) << ended.err;
      kills += !complete;
      if (!std::filesystem::exists(dir / "study/results.h5")) continue;
      const h5::File file = h5::File::open(dir / "study/results.h5");
      EXPECT_GE(file.groups("runs").size(), done);
      done = file.groups("runs").size();
    }
    EXPECT_GE(kills, 2u);
    complete();
    expect_as_one_by_one();
    const h5::File file = h5::File::open(dir / "study/results.h5");
    EXPECT_EQ(file.groups("runs").size(), study().runs.size());
  }
}

TEST_F(Sweep, GoesOnAfterASignal) {
  change("steps: 8", "steps: 150");
  change("[1, 2]", "[1]");
  change("[0.5, 0.4]", "0.5");
  for (const auto& [number, count] : {std::pair{SIGTERM, 0}, {SIGINT, 0}, {SIGUSR1, 2}}) {
    std::filesystem::remove_all(dir / "study");
    Program first(line(count));
    ASSERT_TRUE(wait_for_steps("study/runs/full-seed1", 5));
    first.signal(number);
    const Ended stopped = first.wait();
    ASSERT_EQ(stopped.code, 3) << stopped.err << stopped.out;
    const auto steps = static_cast<int64_t>(read_steps(folder("full-seed1")).size());
    ASSERT_LT(steps, 150);
    EXPECT_NE(stopped.out.find(
                  fmt::format("[2/3] full-seed1: stopped by a signal after step {}\n", steps)),
              std::string::npos)
        << stopped.out;
    EXPECT_TRUE(stopped.out.ends_with("study study: stopped; the same command goes on\n"));
    EXPECT_TRUE(std::filesystem::exists(checkpoint("study/runs/full-seed1", steps)));
    EXPECT_FALSE(std::filesystem::exists(folder("dash-target_density0.5-seed1")));
    complete(count);
    if (count == 0) {
      std::filesystem::remove_all(dir / "alone");
      expect_as_one_by_one();
    }
  }
}

TEST_F(Sweep, OneFailedRunDoesNotLoseTheRest) {
  change("- {attention.method: full}",
         "- {train.lr: [1.0e+30, 1.0e-3], train.clip: 0, train.schedule: constant}");
  for (const int count : {0, 2}) {
    std::filesystem::remove_all(dir / "study");
    expect_refusal(sweep(count), 1,
                   {"2 of 10 runs failed", "full-lr1.0e+30-clip0-scheduleconstant-seed1: step 2: ",
                    "run the same command again"});
    const h5::File file = h5::File::open(dir / "study/results.h5");
    EXPECT_EQ(file.groups("runs").size(), 8u);
    EXPECT_TRUE(file.has("runs/dash-target_density0.4-seed2"));
    const Json before = result("dash-target_density0.4-seed2");
    expect_refusal(sweep(count), 1, {"2 of 10 runs failed"});
    EXPECT_EQ(result("dash-target_density0.4-seed2"), before);
  }
}

TEST_F(Sweep, WhatContinuesFromAFailedRunWaits) {
  change("train.lr: 1.0e-2", "train.lr: 1.0e+30, train.clip: 0, train.schedule: constant");
  for (const int count : {0, 2}) {
    const Ended ended = sweep(count);
    expect_refusal(ended, 1, {"8 of 8 runs failed", "dense-seed1: step 2: "});
    EXPECT_NE(ended.out.find("full-seed2: failed: not started, as dense-seed2 failed"),
              std::string::npos)
        << ended.out;
    EXPECT_EQ(files_in(dir / "study/runs"), (Names{"dense-seed1", "dense-seed2"}));
  }
}

TEST_F(Sweep, RefusesBadStudiesBeforeAnythingStarts) {
  const std::string good = yaml;
  const auto refused = [&](const std::string& part, const std::string& by,
                           const std::vector<std::string>& parts) {
    change(part, by);
    expect_refused(parts);
    EXPECT_FALSE(std::filesystem::exists(dir / "study"));
    yaml = good;
  };
  refused("target_density", "targt_density",
          {"study.yaml:14", "attention.targt_density", "did you mean attention.target_density?"});
  refused("0.4", "0.01", {"study.yaml:14", "0.01 is below the floor", "dash-target_density0.01"});
  refused("attention.method: full",
          "attention.method: nsa, attention.init_blocks: 2, attention.topk: [4, 2]",
          {"study.yaml:13", "attention.topk 2 is less than the forced blocks",
           "run nsa-init_blocks2-topk2"});
  write_file(dir / "study.yaml", good);
  std::filesystem::rename(dir / "tokens.h5", dir / "elsewhere.h5");
  expect_refused({"tokens.h5"}, 1);
  EXPECT_FALSE(std::filesystem::exists(dir / "study"));
}

TEST_F(Sweep, RefusesBatchesThatRanksCannotShare) {
  change("global_batch: 4", "global_batch: 3");
  expect_refusal(sweep(2), 2, {"train.global_batch is 3", "2 ranks"});
  EXPECT_FALSE(std::filesystem::exists(dir / "study"));
}

TEST_F(Sweep, RefusesToMixWithWhatIsThere) {
  complete();
  const auto before = snapshot();
  const std::string good = yaml;
  const auto refused = [&](const std::string& part, const std::string& by,
                           const std::vector<std::string>& parts) {
    change(part, by);
    expect_refused(parts);
    expect_unchanged(before);
    yaml = good;
  };
  const std::string advice = "choose another study.dir, or remove the folder study/runs/full-seed1";
  refused("lr: 3.0e-3", "lr: 2.0e-3",
          {"run full-seed1: ", "has train.lr 0.003, but study.yaml says 0.002", advice});
  refused("train.steps: 6", "train.steps: 7",
          {"run dense-seed1: ", "train.steps 6, but study.yaml says 7"});
  refused("chunk: 2", "chunk: 1", {"run dense-seed1: ", "attention.chunk 2, but", "says 1"});

  // What changes no result may change.
  change("checkpoint: {every: 3, keep: 2}", "checkpoint: {every: 0}");
  complete();
  EXPECT_EQ(snapshot().at(folder("full-seed1") + "/result.json"),
            before.at(folder("full-seed1") + "/result.json"));
}

TEST_F(Sweep, RefusesAnotherProtocolInTheSameFolder) {
  complete();
  const auto before = snapshot();
  from_scratch();
  expect_refused({"run full-seed1: ", "study.protocol continued, but study.yaml says scratch"});
  expect_unchanged(before);
}

TEST_F(Sweep, RefusesToReplaceTheResultsOfAnotherStudy) {
  complete();
  const auto before = snapshot();
  const std::string good = yaml;
  change("seeds: [1, 2]", "seeds: [3]");
  expect_refused({"results.h5 is of other runs (dash-target_density0.4-seed1, ...)", "study.dir"});
  from_scratch();
  expect_refused({"results.h5 is of protocol continued, but study.yaml says scratch"});
  expect_unchanged(before);
}

TEST_F(Sweep, ContinuesFromTheEndOfTheDenseRunOnly) {
  complete();
  const int64_t steps = study().runs[0].config.train.steps;
  const std::string last = checkpoint_path(folder("dense-seed1"), steps);
  write_file(last, read_file(last).substr(0, 5000));
  std::filesystem::remove_all(folder("full-seed1"));
  const Ended ended = sweep();
  EXPECT_EQ(ended.code, 1);
  for (const char* part : {"skipping a checkpoint", "1 of 8 runs failed (full-seed1: ",
                           "of step 3 of 6", "remove the folders"}) {
    EXPECT_NE(ended.err.find(part), std::string::npos) << ended.err;
  }
  EXPECT_FALSE(std::filesystem::exists(folder("full-seed1") + "/result.json"));
}

TEST_F(Sweep, OneProcessAtATime) {
  complete();
  std::filesystem::remove(folder("full-seed1") + "/result.json");
  const auto before = snapshot();
  const FolderLock lock(dir / "study", "works on");
  expect_refusal(sweep(), 1, {"another process works on", "study"});
  expect_unchanged(before);
}

TEST_F(Sweep, RefusesToMixWithRunsThatBrokeOff) {
  complete();
  std::filesystem::remove(folder("full-seed1") + "/result.json");
  std::filesystem::remove(folder("dense-seed1") + "/result.json");
  const auto before = snapshot();
  const std::string good = yaml;
  change("lr: 3.0e-3", "lr: 2.0e-3");
  expect_refused({"run full-seed1: ", "config.yaml has train.lr 0.003"});
  expect_unchanged(before);
  write_file(dir / "study.yaml", good);
  // What continued from a dense run does not go with another.
  std::filesystem::remove_all(folder("dense-seed1"));
  const auto without = snapshot();
  expect_refused({"run full-seed1: it continued from dense-seed1, which is no longer there"});
  expect_unchanged(without);
}

TEST_F(Sweep, RefusesToMixTokens) {
  complete();
  std::filesystem::remove(folder("full-seed1") + "/result.json");
  const auto before = snapshot();
  std::filesystem::remove(dir / "tokens.h5");
  write_store(dir / "tokens.h5", 2);
  expect_refused({"run dense-seed1 was trained on other tokens than tokens.h5 has now"});
  expect_unchanged(before);
}

TEST_F(Sweep, MovesWithItsFolder) {
  complete();
  std::filesystem::rename(dir / "study", dir / "moved");
  change("dir: study", "dir: moved");
  const Ended ended = sweep();
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_NE(ended.out.find("study moved: 8 of 8 runs done"), std::string::npos) << ended.out;
}

TEST_F(Sweep, EvaluatesAgainWhatWasNotWrittenWhole) {
  complete();
  const std::string path = folder("full-seed1") + "/result.json", whole = read_file(path);
  write_file(path, whole.substr(0, whole.size() / 2));
  complete();
  Json again = result("full-seed1"), before = Json::parse(whole);
  for (Json* r : {&again, &before}) {
    r->erase("eval_tokens_per_second");
    (*r)["eval"].erase("tokens_per_second");
  }
  EXPECT_EQ(again, before);
}

// A process that writes past its limit is killed, unless it ignores the signal: then it meets what
// a full disk gives.
TEST_F(Sweep, KilledOrOutOfDiskWhileWritingResultsLeavesTheOldOnes) {
  complete();
  const std::string h5 = dir / "study/results.h5", csv = dir / "study/results.csv";
  const std::string before = read_file(h5), rows = read_file(csv);
  change("# A study", "# Another study");
  const Ended killed = run("ulimit -c 0; ulimit -f 16; " + line());
  EXPECT_EQ(killed.code, 128 + SIGXFSZ) << killed.err;
  EXPECT_EQ(read_file(h5), before);
  expect_refusal(run("trap '' XFSZ; ulimit -f 16; " + line()), 1,
                 {"study/results.h5 was not written and is as before", "File too large"});
  EXPECT_EQ(read_file(h5), before);
  EXPECT_EQ(read_file(csv), rows);
  complete();
  EXPECT_EQ(h5::File::open(h5).text("", "study"), yaml);
  EXPECT_EQ(files_in(dir / "study"), (Names{"results.csv", "results.h5", "runs"}));
}

TEST_F(Sweep, WritesPlainLinesIntoAFile) {
  const Ended ended = sweep();
  EXPECT_EQ(ended.out.find_first_of("\r\x1b"), std::string::npos) << ended.out;
  EXPECT_TRUE(
      ended.out.starts_with("study study: 0 of 8 runs done\n"
                            "[1/8] dense-seed1: starts\n"
                            "[1/8] dense-seed1: done, loss "))
      << ended.out;
  EXPECT_EQ(ended.out.find("tok/s  "), ended.out.rfind("tok/s  ")) << "no steps: " << ended.out;
  EXPECT_EQ(std::ranges::count(ended.out, '\n'), 1 + 2 * 8 + 2 + 8) << ended.out;
}

TEST_F(Sweep, ShowsALiveTableOnATerminal) {
  change("[1, 2]", "[1]");
  for (const int count : {0, 2}) {
    std::filesystem::remove_all(dir / "study");
    const std::string shown = shown_on_terminal(line(count));
    EXPECT_NE(shown.find("dense-seed1                   running"), std::string::npos) << shown;
    EXPECT_NE(shown.find("\r\x1b[Kstep 1/6  loss "), std::string::npos) << shown;
    EXPECT_NE(shown.find("\x1b[6A"), std::string::npos) << "back to the top: " << shown;
    const std::string end = shown.substr(shown.rfind("study study: 4 of 4 runs done"));
    for (const StudyRun& run : study().runs) {
      EXPECT_NE(end.find(run.name), std::string::npos) << end;
    }
    EXPECT_EQ(end.find("waiting"), std::string::npos) << end;
  }
}

}  // namespace
}  // namespace entrain
