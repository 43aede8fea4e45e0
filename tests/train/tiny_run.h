#pragma once
// Runs of the program itself on a model and text so small that one takes a fraction of a second.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "core/h5.h"
#include "tests/program.h"
#include "tests/train/tiny_store.h"
#include "train/checkpoint.h"

namespace entrain {

using Json = nlohmann::json;

inline std::vector<Json> read_metrics(const std::string& run) {
  std::vector<Json> lines;
  std::istringstream in(read_file(run + "/metrics.jsonl"));
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

/// The lines of training steps, each step once and in order.
inline std::vector<Json> read_steps(const std::string& run) {
  std::vector<Json> steps;
  for (const Json& line : read_metrics(run)) {
    if (line.contains("loss")) steps.push_back(line);
  }
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i]["step"], i + 1) << run;
  return steps;
}

/// The same numbers in every step, to the last bit.
inline void expect_same_steps(const std::string& run, const std::string& expected) {
  const std::vector<Json> a = read_steps(run), b = read_steps(expected);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    for (const char* key :
         {"tokens", "loss", "lr", "grad_norm", "density", "router_density", "gamma"}) {
      ASSERT_EQ(a[i][key], b[i][key]) << key << " in step " << i + 1 << " of " << run;
    }
  }
}

/// The same losses but for rounding. It moves what is measured with them more: where a routing
/// score lies on the edge of being read, it decides.
inline void expect_near_steps(const std::string& run, const std::string& expected,
                              double relative = 1e-5) {
  const std::vector<Json> a = read_steps(run), b = read_steps(expected);
  ASSERT_EQ(a.size(), b.size());
  ASSERT_FALSE(a.empty());
  for (size_t i = 0; i < a.size(); ++i) {
    const auto expect_near = [&](const char* key, double tolerance) {
      const double x = a[i][key], y = b[i][key];
      ASSERT_NEAR(x, y, tolerance * std::abs(y)) << key << " in step " << i + 1 << " of " << run;
    };
    expect_near("loss", relative);
    for (const char* key : {"grad_norm", "density", "router_density", "gamma"}) {
      expect_near(key, 100 * relative);
    }
  }
}

/// The same tensors (parameters, moments, random state) and state, to the last bit.
inline void expect_same_checkpoints(const std::string& a, const std::string& b) {
  const h5::File x = h5::File::open(a), y = h5::File::open(b);
  ASSERT_EQ(x.datasets(), y.datasets());
  for (const std::string& name : x.datasets()) {
    EXPECT_EQ(x.read(name).bytes, y.read(name).bytes) << name;
  }
  const CheckpointInfo info = read_info(a), other = read_info(b);
  EXPECT_EQ(info.state, other.state);
  EXPECT_EQ(info.data_fingerprint, other.data_fingerprint);
}

inline std::vector<std::string> files_in(const std::string& folder) {
  std::vector<std::string> names;
  if (!std::filesystem::exists(folder)) return names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  std::ranges::sort(names);
  return names;
}

class TinyRun : public testing::Test {
 protected:
  TinyRun() {
    write_store(dir / "tokens.h5");
    write_file(dir / "run.yaml", fmt::format(R"(
model: {{n_layer: 2, d_model: 32, n_head: 4, n_kv_head: 2, head_dim: 8, d_ff: 48}}
attention: {{method: full, chunk: 8}}
data: {{path: {}, seq_len: 64}}
train: {{steps: 12, global_batch: 6, micro_batch: 2, lr: 3.0e-3, log_every: 1}}
checkpoint: {{every: 0, keep: 0}}
eval: {{every: 0, sequences: 4}}
run: {{dir: {}, device: cpu}}
)",
                                             dir / "tokens.h5", dir / "run"));
  }

  /// "entrain train" on run.yaml with run.dir `name` and these arguments.
  std::string train_line(const std::string& name, const std::string& arguments = "") const {
    return fmt::format("{} train {} run.dir={} {}", ENTRAIN_BINARY, dir / "run.yaml", dir / name,
                       arguments);
  }

  /// What a line of bash starts with: one thread a rank, since tests run next to each other. mpirun
  /// waits twice its time to kill when a rank ends with another code than 0; runs this small need
  /// little. Leaks inside Open MPI are not ours to report.
  static std::string environment() {
    return "export OMP_NUM_THREADS=1; . " TOOLS
           "/mpi-env; export OMPI_MCA_odls_base_sigkill_timeout=1 "
           "ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1; ";
  }
  static std::string alone(const std::string& line) { return environment() + "exec " + line; }
  static std::string ranks(int count, const std::string& line) {
    return environment() + fmt::format("exec " MPIEXEC " -np {} {}", count, line);
  }
  static Ended run(const std::string& line) { return Program(line).wait(); }

  /// Trains to the end.
  void train(const std::string& name, const std::string& arguments = "", int count = 0) const {
    const std::string line = train_line(name, arguments);
    const Ended ended = run(count ? ranks(count, line) : alone(line));
    ASSERT_EQ(ended.code, 0) << ended.err;
  }

  /// Waits until a run has done that many steps; false when it ended or hangs.
  bool wait_for_steps(const std::string& name, int64_t steps) const {
    for (int i = 0; i < 60000; ++i) {
      const std::string path = dir / name + "/metrics.jsonl";
      const std::string text = std::filesystem::exists(path) ? read_file(path) : "";
      if (std::ranges::count(text, '\n') >= steps) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  Json evaluate(const std::string& arguments, int count = 0) const {
    const std::string line = fmt::format("{} eval --json {}", ENTRAIN_BINARY, arguments);
    const Ended ended = run(count ? ranks(count, line) : alone(line));
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.code == 0 ? Json::parse(ended.out) : Json();
  }

  /// One line that says why, and a code that is not 0.
  static void expect_refusal(const Ended& ended, int code, const std::vector<std::string>& parts) {
    EXPECT_EQ(ended.code, code) << ended.err;
    const std::vector<std::string> errors = ended.errors();
    ASSERT_EQ(errors.size(), 1u) << ended.err;
    for (const std::string& part : parts) {
      EXPECT_NE(errors[0].find(part), std::string::npos) << errors[0] << "\nlacks: " << part;
    }
  }

  std::string checkpoint(const std::string& name, int64_t step) const {
    return checkpoint_path(dir / name, step);
  }

  TempDir dir;
};

}  // namespace entrain
