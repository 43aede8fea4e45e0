#include "train/console.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

namespace entrain {
namespace {

StepMetrics some_step() {
  return {.step = 20,
          .steps = 1000,
          .loss = 3.21444,
          .grad_norm = 1.234,
          .tokens_per_second = 9526.0,
          .flops_per_second = 84.21e9,
          .peak_share = 0.4512,
          .density = 0.25,
          .seconds_left = 125.0};
}

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

TEST(Duration, ShowsTwoUnits) {
  EXPECT_EQ(format_duration(0.4), "0s");
  EXPECT_EQ(format_duration(59.6), "1m00s");
  EXPECT_EQ(format_duration(125), "2m05s");
  EXPECT_EQ(format_duration(3600 + 2 * 60), "1h02m");
  EXPECT_EQ(format_duration(3 * 86400 + 4 * 3600 + 59), "3d04h");
}

TEST(FormatStep, ShowsEverythingWhereThereIsRoom) {
  EXPECT_EQ(format_step(some_step(), 200),
            "step   20/1000  loss 3.2144  9.53k tok/s  84.2 GFLOP/s (45% of peak)  density 0.250  "
            "grad 1.23  2m05s left");
}

TEST(FormatStep, LeavesOutWhatIsUnknown) {
  StepMetrics metrics = some_step();
  metrics.peak_share = 0.0;
  metrics.density = 0.0;
  metrics.seconds_left = std::nan("");
  EXPECT_EQ(format_step(metrics, 200),
            "step   20/1000  loss 3.2144  9.53k tok/s  84.2 GFLOP/s  grad 1.23");
}

TEST(FormatStep, FitsEveryWidthAndKeepsWhatMattersMost) {
  for (size_t width = 0; width < 120; ++width) {
    EXPECT_LE(format_step(some_step(), width).size(), width);
  }
  EXPECT_EQ(format_step(some_step(), 30), "step   20/1000  loss 3.2144");
  EXPECT_EQ(format_step(some_step(), 45), "step   20/1000  loss 3.2144  2m05s left");
}

TEST(FormatStep, SurvivesNonFiniteValues) {
  StepMetrics metrics = some_step();
  metrics.loss = metrics.tokens_per_second = metrics.seconds_left = std::nan("");
  metrics.flops_per_second = metrics.grad_norm = INFINITY;
  EXPECT_NE(format_step(metrics, 200).find("loss nan"), std::string::npos);
}

TEST(Console, AFileGetsPlainLinesEveryFewStepsAndTheLast) {
  const File file(std::tmpfile());
  {
    Console console(file.get(), 10);
    StepMetrics metrics = some_step();
    metrics.steps = 25;
    for (metrics.step = 1; metrics.step <= 25; ++metrics.step) console.step(metrics);
    console.say("done");
  }
  std::rewind(file.get());
  std::string text(4096, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  EXPECT_EQ(std::ranges::count(text, '\n'), 4) << text;
  EXPECT_EQ(text.find_first_of("\r\x1b"), text.npos) << text;
  EXPECT_NE(text.find("step 10/25"), text.npos);
  EXPECT_NE(text.find("\nstep 25/25"), text.npos);
  EXPECT_TRUE(text.ends_with("left\ndone\n")) << text;
}

TEST(Console, ATerminalGetsOneLineThatIsOverwritten) {
  const int main_end = ::posix_openpt(O_RDWR | O_NOCTTY);
  if (main_end < 0 || ::grantpt(main_end) != 0 || ::unlockpt(main_end) != 0) {
    GTEST_SKIP() << "no pseudo-terminals here";
  }
  const File screen(::fdopen(main_end, "r"));
  File out(std::fopen(::ptsname(main_end), "w"));
  ASSERT_TRUE(out);
  const winsize size{.ws_row = 24, .ws_col = 60, .ws_xpixel = 0, .ws_ypixel = 0};
  ASSERT_EQ(::ioctl(main_end, TIOCSWINSZ, &size), 0);
  {
    Console console(out.get(), 10);
    StepMetrics metrics = some_step();
    for (metrics.step = 1; metrics.step <= 3; ++metrics.step) {
      console.step(metrics);
      std::this_thread::sleep_for(std::chrono::milliseconds(101));  // as fast as it may change
    }
    console.say("saved");
    console.step(metrics);
  }
  out.reset();
  std::string text;
  char letter;
  while (::read(main_end, &letter, 1) == 1) text += letter;
  EXPECT_EQ(text.find("FLOP"), text.npos) << text;       // would not fit into 60 columns
  EXPECT_EQ(std::ranges::count(text, '\n'), 2) << text;  // after "saved" and at the end
  EXPECT_NE(text.find("\r\x1b[Kstep    2/1000"), text.npos) << text;
  EXPECT_NE(text.find("\r\x1b[Ksaved\r\n"), text.npos) << text;
  EXPECT_TRUE(text.ends_with("\r\n")) << text;
}

}  // namespace
}  // namespace entrain
