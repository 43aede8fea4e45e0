#include "train/study.h"

#include <gtest/gtest.h>

#include "core/file.h"
#include "train/study_file.h"

namespace entrain {
namespace {

using Names = std::vector<std::string>;

const std::string tiny = read_file(TEST_VECTORS "/../train/tiny_study.yaml");

// The tiny study with one part of its text replaced.
std::string with(const std::string& part, const std::string& by) {
  const size_t at = tiny.find(part);
  EXPECT_NE(at, tiny.npos) << part;
  return std::string(tiny).replace(at, part.size(), by);
}

std::string scratch() {
  const size_t begin = tiny.find("dense: "), end = tiny.find('\n', begin) + 1;
  std::string text = std::string(tiny).erase(begin, end - begin);
  return text.replace(text.find("continued"), 9, "scratch");
}

std::string error_of(const std::string& yaml) {
  try {
    read_study(yaml, "s.yaml");
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

Names names_of(const Study& study) {
  Names names;
  for (const StudyRun& run : study.runs) names.push_back(run.name);
  return names;
}

TEST(Study, ContinuesEveryMethodFromTheDenseRunOfItsSeed) {
  const Study study = read_study(tiny, "s.yaml");
  EXPECT_EQ(study.dir, "study");
  EXPECT_EQ(study.protocol, "continued");
  EXPECT_EQ(study.yaml, tiny);
  EXPECT_EQ(names_of(study),
            (Names{"dense-seed1", "full-seed1", "dash-target_density0.5-seed1",
                   "dash-target_density0.4-seed1", "dense-seed2", "full-seed2",
                   "dash-target_density0.5-seed2", "dash-target_density0.4-seed2"}));
  for (size_t i = 0; i < study.runs.size(); ++i) {
    const StudyRun& run = study.runs[i];
    const uint64_t seed = i < 4 ? 1 : 2;
    const bool dense = i % 4 == 0;
    EXPECT_EQ(run.config.train.seed, seed);
    EXPECT_EQ(run.config.dir, "study/runs/" + run.name);
    EXPECT_EQ(run.dense, dense);
    EXPECT_EQ(run.init_from, dense ? "" : fmt::format("dense-seed{}", seed));
    EXPECT_EQ(run.config.train.init_from, dense ? "" : "study/runs/" + run.init_from);
    EXPECT_EQ(run.config.data.skip, dense ? 0 : 6 * 4);
    EXPECT_EQ(run.config.train.steps, dense ? 6 : 8);
    EXPECT_EQ(run.config.train.optim.lr, dense ? 1e-2 : 3e-3);
    EXPECT_EQ(run.config.attention.method, i % 4 < 2 ? "full" : "dash");
    EXPECT_EQ(run.config.attention.chunk, 2);
    EXPECT_EQ(run.config.eval.sequences, 4);
  }
  EXPECT_EQ(study.runs[0].varied.dump(), "{}");
  EXPECT_EQ(study.runs[3].config.attention.target_density, 0.4);
  EXPECT_EQ(study.runs[3].varied.dump(),
            R"({"attention.method":"dash","attention.target_density":0.4})");
}

TEST(Study, StartsFromScratch) {
  const Study study = read_study(scratch(), "s.yaml");
  EXPECT_EQ(names_of(study),
            (Names{"full-seed1", "dash-target_density0.5-seed1", "dash-target_density0.4-seed1",
                   "full-seed2", "dash-target_density0.5-seed2", "dash-target_density0.4-seed2"}));
  for (const StudyRun& run : study.runs) {
    EXPECT_EQ(run.init_from, "");
    EXPECT_EQ(run.config.train.init_from, "");
    EXPECT_EQ(run.config.data.skip, 0);
    EXPECT_EQ(run.config.train.steps, 8);
  }
}

TEST(Study, MultipliesListsOutAndNamesRunsByAllTheirEntrySets) {
  std::string text = scratch();
  const std::string entry = "- {attention.method: full}";
  text.replace(
      text.find(entry), entry.size(),
      "- {train.lr: [1e-3, 0.002], attention.method: [full, infllmv2], data.path: a/b.h5}");
  const Study study = read_study(text, "s.yaml");
  const Names names = names_of(study);
  EXPECT_EQ(Names(names.begin(), names.begin() + 4),
            (Names{"full-lr0.001-patha_b.h5-seed1", "infllmv2-lr0.001-patha_b.h5-seed1",
                   "full-lr0.002-patha_b.h5-seed1", "infllmv2-lr0.002-patha_b.h5-seed1"}));
  EXPECT_EQ(study.runs[3].config.train.optim.lr, 0.002);
  EXPECT_EQ(study.runs[3].config.data.path, "a/b.h5");
  // The others' names are as without it.
  EXPECT_EQ(names[4], names_of(read_study(scratch(), "s.yaml"))[1]);
}

TEST(Study, TheDenseRunIsDenseWhateverTheBaseSays) {
  std::string text = with("{chunk: 2}", "{chunk: 2, method: dash, target_density: 0.4}");
  const std::string entry = "- {attention.method: full}\n  ";
  text.erase(text.find(entry), entry.size());
  const Study study = read_study(text, "s.yaml");
  EXPECT_EQ(study.runs[0].name, "dense-seed1");
  EXPECT_EQ(study.runs[0].config.attention.method, "full");
  EXPECT_EQ(study.runs[0].config.attention.target_density, 0);
  EXPECT_EQ(study.runs[1].config.attention.method, "dash");
}

TEST(Study, NamesFileLineAndTheNearestKey) {
  EXPECT_EQ(error_of(with("attention.target_density", "attention.target_densty")),
            "s.yaml:13: unknown key attention.target_densty; did you mean "
            "attention.target_density?");
  EXPECT_EQ(error_of(with("train.lr: 1.0e-2", "train.learning_rate: 1")),
            "s.yaml:10: unknown key train.learning_rate; did you mean train.lr?");
  EXPECT_EQ(error_of(with("n_layer", "n_layers")),
            "s.yaml:4: unknown key model.n_layers; did you mean model.n_layer?");
  EXPECT_EQ(error_of(with("grid:", "gird:")),
            "s.yaml:11: unknown section gird; did you mean grid?");
  EXPECT_EQ(error_of(with("seeds:", "seed:")),
            "s.yaml:2: unknown key study.seed; did you mean study.seeds?");
  EXPECT_EQ(error_of(with("protocol: continued", "protocol: continue")),
            "s.yaml:2: study.protocol must be scratch or continued, not 'continue'");
  EXPECT_EQ(error_of(with(", protocol: continued", "")),
            "s.yaml: missing study.protocol, scratch: all from the seed's initial weights; "
            "continued: from one dense model");
  EXPECT_EQ(error_of(with("steps: 8, ", "")), "s.yaml: missing train.steps (run full-seed1)");
  EXPECT_EQ(error_of("study: {dir: a, protocol: scratch, seeds: 1}\ngrid: [{}]\n"),
            "s.yaml: missing the section base");
  EXPECT_EQ(error_of(""), "s.yaml is empty; it needs the sections study, base and grid");
}

TEST(Study, RefusesWrongTypesAndForms) {
  EXPECT_EQ(error_of(with("[0.5, 0.4]", "[0.5, few]")),
            "s.yaml:13: attention.target_density must be a finite number, not 'few'");
  EXPECT_EQ(error_of(with("[0.5, 0.4]", "[]")),
            "s.yaml:13: attention.target_density is an empty list");
  EXPECT_EQ(error_of(with("[0.5, 0.4]", "[[0.5]]")),
            "s.yaml:13: attention.target_density must be a value or a list of values, not a list");
  EXPECT_EQ(error_of(with("attention.target_density: [0.5, 0.4]", "attention: {gamma: 2}")),
            "s.yaml:13: attention must be a key in full with its value, as in train.lr: 1.0e-3");
  EXPECT_EQ(error_of(with("seeds: [1, 2]", "seeds: [1, two]")),
            "s.yaml:2: train.seed must be a whole number, not 'two'");
  EXPECT_EQ(error_of(with("train.lr: 1.0e-2", "train.lr: [1.0e-2, 1]")),
            "s.yaml:10: train.lr must be one value");
  EXPECT_EQ(error_of(with("train.lr: 1.0e-2", "attention.method: dash")),
            "s.yaml:10: the dense run has attention.method full, not 'dash'");
  EXPECT_EQ(error_of(with("attention.method: full", "train.steps: 8, train.steps: 9")),
            "s.yaml:12: train.steps is given twice");
  EXPECT_EQ(error_of(with("- {attention.method: full}", "- full")),
            "s.yaml:12: an entry of the grid must be a map of keys, not a value");
}

TEST(Study, ChecksEveryRun) {
  EXPECT_EQ(error_of(with("[0.5, 0.4]", "[0.5, 0.05]")),
            "s.yaml:13: attention.target_density 0.05 is below the floor of about 0.188; take "
            "data.seq_len 240 or more (run dash-target_density0.05-seed1)");
  EXPECT_EQ(error_of(with("[0.5, 0.4]}",
                          "[0.5, 0.4]}\n"
                          "  - {attention.method: nsa, attention.init_blocks: 2, "
                          "attention.topk: [4, 2]}")),
            "s.yaml:14: attention.topk 2 is less than the forced blocks, attention.init_blocks 2 "
            "and attention.local_blocks 1; take 3 or more (run nsa-init_blocks2-topk2-seed1)");
  EXPECT_EQ(error_of(with("train.steps: 6", "train.steps: 0")),
            "s.yaml:10: train.steps must be at least 1, not 0 (run dense-seed1)");
}

TEST(Study, RefusesWhatFollowsFromTheStudy) {
  EXPECT_EQ(error_of(with("lr: 3.0e-3", "seed: 3")),
            "s.yaml:7: a study cannot set train.seed: give study.seeds");
  EXPECT_EQ(error_of(with("train.lr: 1.0e-2", "data.skip: 3")),
            "s.yaml:10: a study cannot set data.skip: study.protocol says where in the data runs "
            "start");
  EXPECT_EQ(error_of(with("attention.method: full", "train.init_from: x")),
            "s.yaml:12: a study cannot set train.init_from: study.protocol says what runs start "
            "from");
  EXPECT_EQ(error_of(with("base:", "base:\n  run: {dir: x}")),
            "s.yaml:4: a study cannot set run.dir: the study names its runs' folders");
  EXPECT_EQ(error_of(with("attention.method: full", "run.device: cpu")),
            "s.yaml:12: a study cannot set run.device: only base can, for all runs alike");
  EXPECT_EQ(error_of(with("continued", "scratch")),
            "s.yaml:10: the section dense needs study.protocol continued, not scratch");
}

TEST(Study, RefusesRunsThatCannotContinue) {
  EXPECT_EQ(error_of(with("attention.method: full", "data.seq_len: 32")),
            "s.yaml:12: data.seq_len is 32 in run full-seq_len32-seed1 but 64 in dense-seed1, "
            "which it continues; give all runs the same");
  EXPECT_EQ(error_of(with("train.lr: 1.0e-2", "model.n_layer: 3")),
            "s.yaml:4: model.n_layer is 2 in run full-seed1 but 3 in dense-seed1, which it "
            "continues; give all runs the same");
}

TEST(Study, RefusesTwoRunsOfTheSameName) {
  EXPECT_EQ(error_of(with("[0.5, 0.4]", "[0.5, 5e-1]")),
            "s.yaml:13: a second run named dash-target_density0.5-seed1, which s.yaml:13 gives "
            "already; make them differ, or remove one");
  EXPECT_EQ(error_of(with("seeds: [1, 2]", "seeds: [2, 2]")),
            "s.yaml:2: a second run named dense-seed2, which s.yaml:2 gives already; make them "
            "differ, or remove one");
}

TEST(Study, TheExampleIsOne) {
  const Study study = load_study(TEST_VECTORS "/../../experiments/pareto/study.yaml");
  EXPECT_EQ(study.runs.size(), 2u * (1 + 1 + 3 + 3 + 3));
}

TEST(Study, HelpNamesEveryKey) {
  for (const char* name : {"base", "dense", "grid", "study.dir", "study.protocol", "study.seeds"}) {
    EXPECT_NE(describe_study().find(std::string("  ") + name), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace entrain
