#include "train/sweep.h"

#include <algorithm>
#include <optional>
#include <set>

#include "core/file.h"
#include "train/result.h"
#include "train/results.h"
#include "train/signals.h"
#include "train/study_folder.h"
#include "train/study_table.h"
#include "train/together.h"

namespace entrain {
namespace {

using Json = nlohmann::ordered_json;

class Sweep {
 public:
  Sweep(const Study& study, Comm& comm, std::FILE* out)
      : study_(study), comm_(comm), main_(comm.rank() == 0), table_(out, study) {}

  RunEnd run();

 private:
  void find_done();
  bool train_missing();
  bool attempt(size_t i);
  void require_trained(const std::string& name) const;
  void fail_run(size_t i, const std::string& why);
  void update_results();
  void report() const;

  const Study& study_;
  Comm& comm_;
  const bool main_;  // rank 0: speaks and writes
  StudyTable table_;
  std::string done_;              // a 1 for each run that is done, else a 0
  std::set<std::string> failed_;  // names, also of runs that could not start for it
  std::string first_failure_;
};

RunEnd Sweep::run() {
  find_done();
  std::optional<FolderLock> lock;
  together(comm_, [&] {
    if (main_) lock.emplace(study_.dir, "works on");
  });
  update_results();  // an earlier call may have ended between a run's result and these
  if (main_) table_.show();
  if (!train_missing()) {
    if (main_) table_.stop();
    return RunEnd::stopped;
  }
  if (main_) table_.finish();
  report();
  return RunEnd::complete;
}

// False when a signal stopped it.
bool Sweep::train_missing() {
  for (size_t i = 0; i < study_.runs.size(); ++i) {
    const StudyRun& run = study_.runs[i];
    if (done_[i] == '1') continue;
    if (stop_requested(comm_)) return false;
    if (failed_.contains(run.init_from)) {
      fail_run(i, fmt::format("not started, as {} failed", run.init_from));
    } else if (!attempt(i)) {
      return false;
    }
  }
  return true;
}

// What rank 0 sees counts for all.
void Sweep::find_done() {
  together(comm_, [&] {
    if (!main_) return;
    require_agreement(study_);
    for (size_t i = 0; i < study_.runs.size(); ++i) {
      const std::optional<Json> result = read_result(study_.runs[i].config.dir);
      done_ += result ? '1' : '0';
      if (result) table_.found(i, *result);
    }
  });
  broadcast(comm_, done_, 0);
  together(comm_, [&] {
    std::vector<size_t> missing;
    for (size_t i = 0; i < done_.size(); ++i) {
      if (done_[i] == '0') missing.push_back(i);
    }
    require_startable(study_, missing, comm_);
  });
}

// False when a signal stopped it.
bool Sweep::attempt(size_t i) {
  const StudyRun& run = study_.runs[i];
  if (main_) table_.start(i);
  try {
    together(comm_, [&] {
      if (main_ && !run.init_from.empty()) require_trained(run.init_from);
    });
    if (train(run.config, /*resume=*/true, comm_, table_) == RunEnd::stopped) return false;
    if (main_) table_.evaluate();
    const RunEvaluation evaluation = evaluate_run(open_run(run.config.dir, {}, comm_), comm_);
    together(comm_, [&] {
      if (!main_) return;
      const Json result = make_result(study_, run, evaluation);
      write_result(run.config.dir, result);
      table_.done(result);
    });
  } catch (const Error& error) {
    if (!comm_.recover()) throw;
    fail_run(i, error.what());
    return true;
  }
  update_results();
  return true;
}

// A damaged checkpoint lets an older one speak for a run. Others must not continue from that.
void Sweep::require_trained(const std::string& name) const {
  const StudyRun& run = *std::ranges::find(study_.runs, name, &StudyRun::name);
  const std::string path = find_checkpoint(run.config.dir);
  const int64_t step = read_info(path).state.step;
  require(step == run.config.train.steps,
          "{} is of step {} of {}: the checkpoint that runs continue from is damaged or gone; "
          "remove the folders of {} and of the runs that continue it",
          path, step, run.config.train.steps, name);
}

void Sweep::fail_run(size_t i, const std::string& why) {
  const std::string& name = study_.runs[i].name;
  if (failed_.empty()) first_failure_ = fmt::format("{}: {}", name, why);
  failed_.insert(name);
  if (main_) table_.fail(i, why);
}

void Sweep::update_results() {
  together(comm_, [&] {
    if (main_) write_results(study_);
  });
}

void Sweep::report() const {
  together(comm_, [&] {
    require(
        !main_ || failed_.empty(),
        "{} of {} runs failed ({}); the others are done. Mend the cause and run the same command "
        "again",
        failed_.size(), study_.runs.size(), first_failure_);
  });
}

}  // namespace

RunEnd sweep(const Study& study, Comm& comm, std::FILE* out) {
  return Sweep(study, comm, out).run();
}

}  // namespace entrain
