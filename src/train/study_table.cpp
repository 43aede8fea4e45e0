#include "train/study_table.h"

#include <algorithm>
#include <cmath>

#include "train/terminal.h"

namespace entrain {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* clear_line = "\r\x1b[K";
constexpr const char *waiting = "waiting", *running = "running", *evaluating = "evaluating",
                     *complete = "done", *failed = "failed", *stopped = "stopped";

double number(const Json& result, const char* key) {
  const auto found = result.find(key);
  return found != result.end() && found->is_number() ? found->get<double>() : NAN;
}

std::string numbers_of(const Json& result) {
  return fmt::format("{:8.4f} {:11.3f} {:8.3f} {:7.3f} {:>7} {:>7}", number(result, "loss"),
                     number(result, "perplexity"), number(result, "density"),
                     number(result, "router_density"),
                     format_si(number(result, "train_tokens_per_second")),
                     format_duration(number(result, "wall_seconds")));
}

}  // namespace

StudyTable::StudyTable(std::FILE* out, const Study& study)
    : out_(out), terminal_(is_terminal(out)), study_(study.dir) {
  for (const StudyRun& run : study.runs) {
    rows_.push_back({run.name, waiting, "", ""});
    width_ = std::max(width_, run.name.size());
  }
}

StudyTable::~StudyTable() {
  if (drawn_ > 0) std::fputc('\n', out_), std::fflush(out_);
}

void StudyTable::found(size_t run, const Json& result) {
  rows_[run].state = complete;
  rows_[run].numbers = numbers_of(result);
}

void StudyTable::show() {
  if (terminal_) {
    draw();
  } else {
    fmt::print(out_, "{}\n", title());
    std::fflush(out_);
  }
}

void StudyTable::start(size_t run) {
  current_ = run;
  last_ = {};
  rows_[run].state = running;
  announce("starts");
}

void StudyTable::step(const StepMetrics& m) {
  last_ = m;
  const auto now = std::chrono::steady_clock::now();
  // As rarely as Console, for the same reason.
  if (!terminal_ || now - shown_ < std::chrono::milliseconds(100)) return;
  shown_ = now;
  fmt::print(out_, "{}{}", clear_line, format_step(m, screen_size(out_).columns - 1));
  std::fflush(out_);
}

void StudyTable::evaluate() {
  rows_[current_].state = evaluating;
  if (terminal_) draw();
}

void StudyTable::done(const Json& result) {
  found(current_, result);
  announce(fmt::format("done, loss {:.4f}, perplexity {:.3f}, density {:.3f}, trained {}",
                       number(result, "loss"), number(result, "perplexity"),
                       number(result, "density"), format_duration(number(result, "wall_seconds"))));
}

void StudyTable::fail(size_t run, const std::string& why) {
  current_ = run;
  rows_[run].state = failed;
  rows_[run].why = why;
  announce("failed: " + why);
}

void StudyTable::stop() {
  if (rows_[current_].state == running) {
    rows_[current_].state = stopped;
    announce(fmt::format("stopped by a signal after step {}", last_.step));
  }
  fmt::print(out_, "{}study {}: stopped; the same command goes on\n", terminal_ ? clear_line : "",
             study_);
  std::fflush(out_);
  drawn_ = 0;
}

void StudyTable::finish() {
  if (terminal_) {
    draw();
    for (const Row& row : rows_) {
      if (!row.why.empty()) fmt::print(out_, "{}{}: {}\n", clear_line, row.name, row.why);
    }
  } else {
    fmt::print(out_, "{}\n{}\n", title(), head());
    for (const Row& row : rows_) fmt::print(out_, "{}\n", line(row));
  }
  std::fflush(out_);
  drawn_ = 0;
}

void StudyTable::announce(const std::string& what) {
  if (terminal_) return draw();
  fmt::print(out_, "[{}/{}] {}: {}\n", current_ + 1, rows_.size(), rows_[current_].name, what);
  std::fflush(out_);
}

// Over the table drawn before, whose first line is drawn_ lines up. What the screen is too low for
// is left out, so that the table never scrolls: the current run stays in sight.
void StudyTable::draw() {
  const Screen screen = screen_size(out_);
  const size_t around = screen.rows > 5 ? screen.rows - 4 : 1;  // title, head, live line, a spare
  const size_t shown = std::min(rows_.size(), around);
  const size_t first = std::min(current_ - std::min(current_, shown / 2), rows_.size() - shown);
  std::vector<std::string> lines{title(), head()};
  for (size_t i = first; i < first + shown; ++i) lines.push_back(line(rows_[i]));
  std::string text = clear_line;
  if (drawn_ > 0) text += fmt::format("\x1b[{}A", drawn_);
  for (const std::string& l : lines) {
    text += clear_line + l.substr(0, screen.columns - 1) + '\n';
  }
  drawn_ = lines.size();
  fmt::print(out_, "{}", text);
  std::fflush(out_);
}

std::string StudyTable::title() const {
  std::string text =
      fmt::format("study {}: {} of {} runs done", study_, count(complete), rows_.size());
  if (const size_t n = count(failed)) text += fmt::format(", {} failed", n);
  return text;
}

std::string StudyTable::head() const {
  return fmt::format("{:<{}}  {:<10} {:>8} {:>11} {:>8} {:>7} {:>7} {:>7}", "run", width_, "state",
                     "loss", "perplexity", "density", "router", "tok/s", "time");
}

std::string StudyTable::line(const Row& row) const {
  return fmt::format("{:<{}}  {:<10} {}", row.name, width_, row.state,
                     row.why.empty() ? row.numbers : row.why);
}

size_t StudyTable::count(const char* state) const {
  return static_cast<size_t>(std::ranges::count(rows_, state, &Row::state));
}

}  // namespace entrain
