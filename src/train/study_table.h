#pragma once
// What a sweep tells its user: where each run of the study is.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/console.h"
#include "train/study.h"

namespace entrain {

/// On a terminal a table that changes in place, the current run's live line under it; in a file a
/// line where a run starts and one where it ends. finish() leaves the whole table in both.
class StudyTable final : public Listener {
 public:
  StudyTable(std::FILE* out, const Study& study);
  ~StudyTable() override;
  StudyTable(const StudyTable&) = delete;
  StudyTable& operator=(const StudyTable&) = delete;

  /// A run's result from an earlier call; before show().
  void found(size_t run, const nlohmann::ordered_json& result);
  /// Now all that is there has been found.
  void show();

  void start(size_t run);
  void step(const StepMetrics& metrics) override;
  /// The small talk of single runs has no place here.
  void say(const std::string&) override {}
  void evaluate();
  void done(const nlohmann::ordered_json& result);
  void fail(size_t run, const std::string& why);
  /// A signal ended the study, and the current run where one was under way.
  void stop();
  void finish();

 private:
  struct Row {
    std::string name, state;
    std::string numbers;  // of a run that is done
    std::string why;      // of one that failed
  };

  void announce(const std::string& what);
  void draw();
  std::string title() const;
  std::string head() const;
  std::string line(const Row& row) const;
  size_t count(const char* state) const;

  std::FILE* out_;
  const bool terminal_;
  std::string study_;
  std::vector<Row> rows_;
  size_t current_ = 0, width_ = 0;
  size_t drawn_ = 0;  // lines of the table on the screen
  StepMetrics last_;  // of the current run
  std::chrono::steady_clock::time_point shown_;
};

}  // namespace entrain
