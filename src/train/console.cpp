#include "train/console.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "train/terminal.h"

namespace entrain {
namespace {

constexpr const char* clear_line = "\r\x1b[K";

}  // namespace

std::string format_si(double value, const char* gap) {
  constexpr const char* units[] = {"", "k", "M", "G", "T", "P"};
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(units)) value /= 1000.0, ++unit;
  const int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return fmt::format("{:.{}f}{}{}", value, decimals, gap, units[unit]);
}

std::string format_duration(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}d{:02}h", s / 86400, s / 3600 % 24);
}

std::string format_step(const StepMetrics& m, size_t width) {
  struct Part {
    int importance;  // the least important ones go first where the width is short
    std::string text;
  };
  std::vector<Part> parts;
  const std::string steps = fmt::format("{}", m.steps);
  parts.push_back({7, fmt::format("step {:>{}}/{}", m.step, steps.size(), steps)});
  parts.push_back({6, fmt::format("loss {:.4f}", m.loss)});
  if (m.tokens_per_second > 0.0) {
    parts.push_back({4, format_si(m.tokens_per_second) + " tok/s"});
  }
  if (m.flops_per_second > 0.0) {
    std::string rate = format_si(m.flops_per_second, " ") + "FLOP/s";
    if (m.peak_share > 0.0) rate += fmt::format(" ({:.0f}% of peak)", 100.0 * m.peak_share);
    parts.push_back({1, rate});
  }
  if (m.density > 0.0) parts.push_back({3, fmt::format("density {:.3f}", m.density)});
  parts.push_back({2, fmt::format("grad {:.2f}", m.grad_norm)});
  if (std::isfinite(m.seconds_left) && m.seconds_left >= 0.0) {
    parts.push_back({5, format_duration(m.seconds_left) + " left"});
  }

  constexpr const char* gap = "  ";
  const auto length = [&] {
    size_t sum = 0;
    for (const Part& part : parts) sum += part.text.size() + 2;
    return sum - 2;
  };
  while (parts.size() > 1 && length() > width) {
    parts.erase(std::ranges::min_element(parts, {}, &Part::importance));
  }
  std::string line;
  for (const Part& part : parts) line += (line.empty() ? "" : gap) + part.text;
  return line.substr(0, width);
}

Console::Console(std::FILE* out, int64_t log_every)
    : out_(out), log_every_(log_every), terminal_(is_terminal(out)) {}

Console::~Console() {
  if (live_) std::fputc('\n', out_), std::fflush(out_);
}

void Console::step(const StepMetrics& m) {
  const bool last = m.step == m.steps;
  if (terminal_) {
    // Not faster than eyes follow: mpirun passes on nothing while it ends its ranks, and one that
    // has filled the way to it would wait there instead of saving.
    const auto now = std::chrono::steady_clock::now();
    if (live_ && !last && now - shown_ < std::chrono::milliseconds(100)) return;
    shown_ = now;
    // One column stays free: a full line would wrap, and then not be overwritten.
    fmt::print(out_, "{}{}", clear_line, format_step(m, screen_size(out_).columns - 1));
    live_ = true;
  } else if (m.step % log_every_ == 0 || last) {
    fmt::print(out_, "{}\n", format_step(m, std::string::npos));
  }
  std::fflush(out_);
}

void Console::say(const std::string& line) {
  fmt::print(out_, "{}{}\n", live_ ? clear_line : "", line);
  std::fflush(out_);
  live_ = false;
}

}  // namespace entrain
