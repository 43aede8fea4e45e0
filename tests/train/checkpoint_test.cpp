#include "train/checkpoint.h"

#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <random>
#include <sstream>
#include <thread>

#include "core/h5.h"
#include "core/rng.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

namespace fs = std::filesystem;

using Specs = std::vector<ParamSpec>;

const std::string q_proj = "model.layers.0.self_attn.q_proj.weight";
const std::string config = "model: {n_layer: 2}\ntrain: {lr: 0.1}\n";

Specs specs() {
  return {{"model.embed_tokens.weight", {20, 8}, 0.02},
          {q_proj, {8, 8}, 0.02},
          {"model.norm.weight", {8}, 0.0, 1.0, false}};
}

Params untouched(const Specs& which = specs(), bool training = true) {
  return Params(which, 77, training, Device::cpu);
}

// Parameters whose values and moments all differ.
Params trained() {
  Params params = untouched();
  Rng rng(1, 99);
  for (const Tensor& t : {params.values(), params.m(), params.v()}) {
    for (int64_t i = 0; i < t.numel(); ++i) t.ptr<float>()[i] = static_cast<float>(rng.normal());
  }
  return params;
}

bool same(const Tensor& a, const Tensor& b) {
  return a.shape == b.shape && std::memcmp(a.data, b.data, a.bytes()) == 0;
}

bool same_values(const Params& a, const Params& b) {
  return std::ranges::equal(a.all(), b.all(), [](const Param& x, const Param& y) {
    return x.name == y.name && same(x.value, y.value);
  });
}

bool same(const Params& a, const Params& b) {
  const auto moment = [](const Tensor& flat, const Param& p) {
    return flat.slice(0, p.begin, p.value.numel());
  };
  return same_values(a, b) && std::ranges::all_of(a.all(), [&](const Param& p) {
           return same(moment(a.m(), p), moment(b.m(), p)) &&
                  same(moment(a.v(), p), moment(b.v(), p));
         });
}

TrainState state_at(int64_t step) {
  return {step, 16 * step, {~uint64_t{0}, 5, 123}, {{"gamma", 1.0 / 3}, {"average", 0.25}}};
}

std::string save(const std::string& run, int64_t step, const Params& params = trained()) {
  const std::string path = checkpoint_path(run, step);
  save_checkpoint(path, params, {params.m(), params.v()}, state_at(step), config, "abc123", 2);
  return path;
}

template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

void expect_line(const std::string& message, const std::vector<std::string>& parts) {
  for (const auto& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << "no '" << part << "' in: " << message;
  }
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

// What the default logger says while this lives.
class Log {
 public:
  Log() : before_(spdlog::default_logger()) {
    auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(out_);
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("test", sink));
  }
  ~Log() { spdlog::set_default_logger(before_); }
  std::string text() const { return out_.str(); }

 private:
  std::ostringstream out_;
  std::shared_ptr<spdlog::logger> before_;
};

using Names = std::vector<std::string>;

Names names_in(const std::string& folder) {
  Names names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

TEST(Checkpoint, RestoresEveryBit) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1000, saved);
  EXPECT_EQ(names_in(run / "checkpoints"), Names{"step_00001000.h5"});

  Params loaded = untouched();
  const CheckpointInfo info = load_checkpoint(path, loaded);
  EXPECT_TRUE(same(loaded, saved));
  EXPECT_EQ(info.state, state_at(1000));
  EXPECT_EQ(info.config_yaml, config);
  EXPECT_EQ(info.data_fingerprint, "abc123");
  EXPECT_FALSE(info.code_version.empty());
  EXPECT_EQ(info.ranks, 2);
}

// Shards that end within a parameter, hold several, and hold none.
TEST(Checkpoint, GivesEachShardItsMoments) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1, saved);
  for (const int count : {1, 2, 3, 7}) {
    for (int index = 0; index < count; ++index) {
      Params loaded(specs(), 77, true, Device::cpu, DType::f32, {index, count});
      load_checkpoint(path, loaded);
      EXPECT_TRUE(same_values(loaded, saved));
      const int64_t first = loaded.shard_begin(index);
      for (const Param& p : saved.all()) {
        for (int64_t i = p.begin; i < p.begin + p.value.numel(); ++i) {
          if (i < first || i >= first + loaded.m().numel()) continue;
          ASSERT_EQ(loaded.m().ptr<float>()[i - first], saved.m().ptr<float>()[i]) << i;
          ASSERT_EQ(loaded.v().ptr<float>()[i - first], saved.v().ptr<float>()[i]) << i;
        }
      }
    }
  }
}

TEST(Checkpoint, InfoListsParameters) {
  TempDir run;
  const CheckpointInfo info = read_info(save(run / "", 7));
  ASSERT_EQ(info.parameters.size(), 3u);
  EXPECT_EQ(info.parameters[1].name, q_proj);
  EXPECT_EQ(info.parameters[1].shape, (Shape{8, 8}));
  EXPECT_EQ(info.state.step, 7);
}

TEST(Checkpoint, ExplainsItself) {
  TempDir run;
  const h5::File file = h5::File::open(save(run / "", 7));
  EXPECT_NE(file.text("", "description").find("entrain"), std::string::npos);
  EXPECT_EQ(file.shape("moments/m/" + q_proj), (Shape{8, 8}));
}

TEST(Checkpoint, LoadsValuesWhereThereAreNoMoments) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1, saved);
  Params loaded = untouched(specs(), false);
  load_checkpoint(path, loaded);
  EXPECT_TRUE(same_values(loaded, saved));
}

TEST(Checkpoint, NamesTheFirstParameterOfAnotherShape) {
  TempDir run;
  const std::string path = save(run / "", 1);
  Specs other = specs();
  other[1].shape = {16, 8};
  other[2].shape = {16};
  Params params = untouched(other);
  expect_line(error_of([&] { load_checkpoint(path, params); }),
              {q_proj, "[8, 8]", "[16, 8]", path});
}

TEST(Checkpoint, NamesAMissingParameter) {
  TempDir run;
  const std::string path = save(run / "", 1);
  Specs more = specs();
  more.push_back({"model.layers.0.self_attn.router.weight", {4, 8}});
  Params params = untouched(more);
  expect_line(error_of([&] { load_checkpoint(path, params); }), {"router.weight", "[4, 8]", path});

  Specs fewer = specs();
  fewer.erase(fewer.begin() + 1);
  Params few = untouched(fewer);
  expect_line(error_of([&] { load_checkpoint(path, few); }), {q_proj, "[8, 8]", path});
}

TEST(Checkpoint, SharesParametersAcrossMethods) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1, saved);
  Specs other = specs();
  other.erase(other.begin());
  other.push_back({"router", {4, 8}, 0.02});
  Params params = untouched(other);
  const Params before = untouched(other);
  const Shared shared = load_shared(path, params);
  EXPECT_EQ(shared.taken, (Names{q_proj, "model.norm.weight"}));
  EXPECT_EQ(shared.fresh, Names{"router"});
  EXPECT_EQ(shared.unused, Names{"model.embed_tokens.weight"});
  EXPECT_TRUE(same(params.get(q_proj).value, saved.get(q_proj).value));
  EXPECT_TRUE(same(params.get("router").value, before.get("router").value));
  EXPECT_TRUE(same(params.m(), before.m()));

  other[0].shape = {16, 8};
  Params wide = untouched(other);
  expect_line(error_of([&] { load_shared(path, wide); }), {q_proj, "[8, 8]", "[16, 8]"});
}

TEST(Checkpoint, StartsNewParametersToFitThoseTaken) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1, saved);
  Specs other = specs();
  const auto add = [&](const char* name, const Adopt& adopt) {
    other.push_back({.name = name, .shape = {8, 8}, .init_std = 0.02, .adopt = adopt});
  };
  add("copy", {.like = q_proj});
  add("constant", {.like = {}, .value = 2.5});
  add("orphan", {.like = "nowhere"});
  Params params = untouched(other);
  const Params before = untouched(other);
  const Shared shared = load_shared(path, params);
  EXPECT_EQ(shared.adopted, (Names{"copy", "constant"}));
  EXPECT_EQ(shared.fresh, Names{"orphan"});
  EXPECT_TRUE(same(params.get("copy").value, saved.get(q_proj).value));
  EXPECT_TRUE(same(params.get("orphan").value, before.get("orphan").value));
  const float* constant = params.get("constant").value.ptr<float>();
  EXPECT_TRUE(std::all_of(constant, constant + 64, [](float x) { return x == 2.5f; }));

  // A checkpoint that has them is taken as it is.
  const std::string full = save(run / "full", 1, params);
  Params again = untouched(other);
  EXPECT_EQ(load_shared(full, again).taken.size(), other.size());
  EXPECT_TRUE(same(again.values(), params.values()));
}

TEST(Checkpoint, RefusesOtherFiles) {
  TempDir dir;
  expect_line(error_of([&] { read_info(dir / "none.h5"); }), {dir / "none.h5"});
  write_file(dir / "text.h5", "not HDF5");
  expect_line(error_of([&] { read_info(dir / "text.h5"); }), {dir / "text.h5"});
  float x = 1;
  h5::File other = h5::File::create(dir / "tensors.h5");
  other.write("x", Tensor::of(&x, {1}));
  other.close();
  expect_line(error_of([&] { read_info(dir / "tensors.h5"); }),
              {dir / "tensors.h5", "not a checkpoint"});
}

TEST(Checkpoint, FindsTruncation) {
  TempDir run;
  const std::string path = save(run / "", 1);
  const std::string whole = read_file(path);
  for (size_t part = 0; part < 50; ++part) {
    const size_t length = part == 49 ? whole.size() - 1 : whole.size() * part / 50;
    write_file(path, whole.substr(0, length));
    expect_line(error_of([&] { verify_checkpoint(path); }), {path});
    Params params = untouched();
    EXPECT_NE(error_of([&] { load_checkpoint(path, params); }), "") << length;
  }
}

// A flipped bit is found, or lies where it changes nothing that is read.
TEST(Checkpoint, FindsFlippedBits) {
  TempDir run;
  const Params saved = trained();
  const std::string path = save(run / "", 1, saved);
  const std::string whole = read_file(path);
  Rng rng(5, 0);
  int found = 0;
  for (int i = 0; i < 400; ++i) {
    const uint64_t bit = rng.below(8 * whole.size());
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    write_file(path, damaged);
    Params params = untouched();
    CheckpointInfo info;
    const std::string message = error_of([&] { info = load_checkpoint(path, params); });
    if (!message.empty()) {
      ++found;
      expect_line(message, {path});
      continue;
    }
    EXPECT_TRUE(same(params, saved)) << bit;
    EXPECT_EQ(info.state, state_at(1)) << bit;
    EXPECT_EQ(info.config_yaml, config) << bit;
    EXPECT_EQ(info.data_fingerprint, "abc123") << bit;
    EXPECT_EQ(info.ranks, 2) << bit;
  }
  EXPECT_GT(found, 100);
}

TEST(Checkpoint, NamesTheTensorWithAFlippedBit) {
  TempDir run;
  const std::string path = save(run / "", 1), copy = run / "copy.h5";
  const std::string whole = read_file(path);
  const h5::File file = h5::File::open(path);
  for (const std::string& name : file.datasets("")) {
    std::string damaged = whole;
    damaged[static_cast<size_t>(file.placed(name).offset)] ^= 0x10;
    write_file(copy, damaged);
    expect_line(error_of([&] { verify_checkpoint(copy); }), {copy, name, "checksum"});
  }
}

TEST(Checkpoint, UsesAnOlderOneWhenTheNewestIsDamaged) {
  TempDir run;
  EXPECT_FALSE(newest_valid(run / "checkpoints").has_value());
  const std::string older = save(run / "", 100), newer = save(run / "", 200);
  EXPECT_EQ(newest_valid(run / "checkpoints"), newer);
  EXPECT_EQ(find_checkpoint(run / ""), newer);
  EXPECT_EQ(find_checkpoint(older), older);

  const std::string bytes = read_file(newer);
  write_file(newer, bytes.substr(0, bytes.size() / 2));
  {
    const Log log;
    EXPECT_EQ(newest_valid(run / "checkpoints"), older);
    EXPECT_NE(log.text().find(newer), std::string::npos) << log.text();
    EXPECT_EQ(log.text().find(older), std::string::npos) << log.text();
  }
  write_file(older, "");
  const Log log;
  expect_line(error_of([&] { newest_valid(run / "checkpoints"); }), {"all checkpoints", "damaged"});
  EXPECT_NE(log.text().find(older), std::string::npos) << log.text();
}

TEST(Checkpoint, NamesARunWithoutAny) {
  TempDir run;
  expect_line(error_of([&] { find_checkpoint(run / ""); }), {run / "checkpoints", "no checkpoint"});
}

TEST(Checkpoint, SortsBySteps) {
  TempDir run;
  save(run / "", 99999999);
  const std::string newest = save(run / "", 100000000);
  write_file(run / "checkpoints/step_x.h5", "ignored");
  EXPECT_EQ(newest_valid(run / "checkpoints"), newest);
}

TEST(Checkpoint, PrunesOlderOnes) {
  TempDir run;
  for (const int step : {1, 2, 3, 4}) save(run / "", step);
  const std::string third = checkpoint_path(run / "", 3);
  prune(third, 0);
  EXPECT_EQ(names_in(run / "checkpoints").size(), 4u);
  prune(third, 3);
  EXPECT_EQ(names_in(run / "checkpoints").size(), 4u);
  // Step 4 is from before a return to an earlier step: neither counted nor removed.
  prune(third, 2);
  EXPECT_EQ(names_in(run / "checkpoints"),
            (Names{"step_00000002.h5", "step_00000003.h5", "step_00000004.h5"}));
  prune(third, 1);
  EXPECT_EQ(names_in(run / "checkpoints"), (Names{"step_00000003.h5", "step_00000004.h5"}));
}

TEST(Checkpoint, RemovesLeftovers) {
  TempDir run;
  const std::string older = save(run / "", 1);
  write_file(checkpoint_path(run / "", 2) + ".partial", "half");
  EXPECT_EQ(newest_valid(run / "checkpoints"), older);
  save(run / "", 3);
  EXPECT_EQ(names_in(run / "checkpoints"), (Names{"step_00000001.h5", "step_00000003.h5"}));
}

// Files that may not grow past a limit fail as a full disk does, at every stage of writing.
TEST(CheckpointDeathTest, FullDiskLeavesOlderOnes) {
  TempDir run;
  const std::string older = save(run / "", 1);
  const rlim_t size = fs::file_size(older);
  for (const rlim_t limit : {rlim_t{0}, rlim_t{1000}, size / 4, size / 2, size - 1}) {
    const auto save_until_full = [&] {
      std::signal(SIGXFSZ, SIG_IGN);
      rlimit files;
      getrlimit(RLIMIT_FSIZE, &files);
      const rlimit small{limit, files.rlim_max};
      setrlimit(RLIMIT_FSIZE, &small);
      const std::string message = error_of([&] { save(run / "", 2); });
      setrlimit(RLIMIT_FSIZE, &files);  // stderr is a file too
      std::fputs(message.c_str(), stderr);
      std::exit(3);  // HDF5 cleans up after itself here
    };
    EXPECT_EXIT(save_until_full(), testing::ExitedWithCode(3),
                "^no checkpoint of step 2: .*File too large.*earlier checkpoints are untouched$")
        << limit;
    EXPECT_EQ(names_in(run / "checkpoints"), Names{"step_00000001.h5"});
    EXPECT_EQ(newest_valid(run / "checkpoints"), older);
  }
}

// A process that saves as fast as it can is killed at random moments; each checkpoint says its step
// in every value.
TEST(Checkpoint, SurvivesKillAtAnyMoment) {
  TempDir run;
  const Specs large = {{"a", {300, 100}}, {"b", {200, 100}}, {"c", {48}}};  // without a gap
  const auto save_steps = [&](int64_t step, int64_t end) {
    Params params = untouched(large);
    for (; step < end; ++step) {
      for (const Tensor& t : {params.values(), params.m(), params.v()}) {
        std::fill_n(t.ptr<float>(), t.numel(), static_cast<float>(step));
      }
      prune(save(run / "", step, params), 2);
    }
  };
  save_steps(1, 2);
  int64_t newest = 1;
  std::random_device entropy;
  Rng rng(entropy(), 0);
  for (int round = 0; round < 25; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      save_steps(newest + 1, 1 << 20);
      _exit(0);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(60000)));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));

    const Log log;
    const auto path = newest_valid(run / "checkpoints");
    ASSERT_TRUE(path.has_value());
    EXPECT_EQ(log.text(), "") << "a damaged file under a final name";
    Params params = untouched(large);
    const int64_t step = load_checkpoint(*path, params).state.step;
    EXPECT_EQ(*path, checkpoint_path(run / "", step));
    EXPECT_GE(step, newest);
    for (const Tensor& t : {params.values(), params.m(), params.v()}) {
      const float* x = t.ptr<float>();
      const auto expected = static_cast<float>(step);
      EXPECT_TRUE(std::all_of(x, x + t.numel(), [=](float value) { return value == expected; }));
    }
    newest = step;
  }
}

}  // namespace
}  // namespace entrain
