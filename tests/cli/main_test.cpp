#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/program.h"

namespace entrain {
namespace {

TEST(Main, ShowsHelpWithTheExitCodes) {
  const Ended help = run_entrain("--help");
  EXPECT_EQ(help.code, 0);
  EXPECT_NE(help.out.find("Exit codes:"), help.out.npos);
  EXPECT_NE(help.out.find("tokenize"), help.out.npos);
  EXPECT_EQ(run_entrain("").out, help.out);
  EXPECT_EQ(run_entrain("").code, 0);
}

TEST(Main, ShowsTheVersion) {
  const Ended version = run_entrain("--version");
  EXPECT_EQ(version.code, 0);
  EXPECT_TRUE(version.out.starts_with("entrain 0.")) << version.out;
}

TEST(Main, RefusesWrongUsageInOneLine) {
  for (const char* arguments : {"trian", "--bogus", "train", "train no-such.yaml"}) {
    const Ended result = run_entrain(arguments);
    EXPECT_EQ(result.code, 2) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_TRUE(result.err.starts_with("entrain: ")) << result.err;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
  }
  EXPECT_EQ(run_entrain("trian").err, "entrain: unknown command trian; did you mean train?\n");
}

TEST(Main, SaysThatItsOutputIsLost) {
  for (const char* arguments : {"", "info", "--help", "info --help"}) {
    const Ended lost = run_entrain(std::string(arguments) + " >/dev/full");
    EXPECT_EQ(lost.code, 1) << arguments;
    EXPECT_EQ(lost.err, "entrain: cannot write all of the standard output (disk full?)\n");
  }
}

TEST(Main, SaysWhatNeedsLessMemory) {
  const Ended bench = run_entrain("bench train --device cpu --d-ff 2000000000");
  EXPECT_EQ(bench.code, 1);
  EXPECT_TRUE(bench.err.starts_with("entrain: out of memory: ")) << bench.err;
  EXPECT_TRUE(bench.err.ends_with(
      " GiB were asked for at once; lower --batch, --tokens or what --shape names\n"))
      << bench.err;
}

}  // namespace
}  // namespace entrain
