#pragma once
// What a run tells its user: a live line on a terminal, plain lines in a file.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

#include "train/metrics.h"

namespace entrain {

/// Three digits and a unit: "950", "9.53k", "84.2G", with `gap` between them.
std::string format_si(double value, const char* gap = "");

/// "2m05s"; two units at most: "45s", "1h02m", "3d04h".
std::string format_duration(double seconds);

/// "step 120/1000  loss 3.214  9.53k tok/s  84.2 GFLOP/s (45% of peak)  density 0.250  grad 1.23
/// 2m05s left" on one line. What is unknown is left out, and what matters least until the line fits
/// into `width` columns.
std::string format_step(const StepMetrics& metrics, size_t width);

/// Whoever a run speaks to, on rank 0.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual void step(const StepMetrics& metrics) = 0;
  /// What a user may want to know beside the numbers, in one line.
  virtual void say(const std::string& line) = 0;
};

class Console final : public Listener {
 public:
  /// On a terminal, also one that mpirun writes to, a line that later steps overwrite; elsewhere a
  /// line every log_every steps and for the last one.
  Console(std::FILE* out, int64_t log_every);
  ~Console() override;
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  void step(const StepMetrics& metrics) override;
  /// A line of its own that stays.
  void say(const std::string& line) override;

 private:
  std::FILE* out_;
  int64_t log_every_;
  bool terminal_;
  std::chrono::steady_clock::time_point shown_;  // when the live line was written
  bool live_ = false;                            // a line without its newline is on the screen
};

}  // namespace entrain
