#pragma once
// How far a long piece of work is: one line that moves on a terminal, a line each tenth in a file.
#include <chrono>
#include <cstdint>
#include <string>

namespace entrain::cli {

class Progress {
 public:
  /// `total` in bytes, 0 where it is not known.
  Progress(std::string what, int64_t total);
  ~Progress();

  void update(int64_t done);

 private:
  void print(int64_t done);

  std::string what_;
  int64_t total_;
  bool terminal_;
  int64_t printed_ = 0;  // bytes at the last line
  std::chrono::steady_clock::time_point start_, last_;
};

}  // namespace entrain::cli
