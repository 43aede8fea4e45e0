#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace entrain::cli {

using Clock = std::chrono::steady_clock;

Progress::Progress(std::string what, int64_t total)
    : what_(std::move(what)),
      total_(total),
      terminal_(isatty(STDERR_FILENO)),
      start_(Clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (terminal_) fmt::print(stderr, "\r\033[K");
}

void Progress::update(int64_t done) {
  const auto now = Clock::now();
  const int64_t step = total_ > 0 ? std::max<int64_t>(total_ / 10, 1) : int64_t{1} << 28;
  const bool due =
      terminal_ ? now - last_ > std::chrono::milliseconds(100) : done / step > printed_ / step;
  if (!due) return;
  last_ = now, printed_ = done;
  print(done);
}

void Progress::print(int64_t done) {
  const double seconds = std::chrono::duration<double>(last_ - start_).count();
  const double megabytes = static_cast<double>(done) / 1e6;
  std::string line = fmt::format("{}: {:.1f} MB", what_, megabytes);
  if (total_ > 0) {
    const double share = std::min(1.0, static_cast<double>(done) / static_cast<double>(total_));
    const auto filled = static_cast<size_t>(share * 30);
    const std::string bar = std::string(filled, '#') + std::string(30 - filled, '.');
    line = terminal_ ? fmt::format("{} [{}] {:3.0f}%", what_, bar, share * 100)
                     : fmt::format("{}: {:.0f}%", what_, share * 100);
  }
  if (seconds > 0) line += fmt::format(", {:.1f} MB/s", megabytes / seconds);
  fmt::print(stderr, "{}{}{}", terminal_ ? "\r\033[K" : "", line, terminal_ ? "" : "\n");
}

}  // namespace entrain::cli
