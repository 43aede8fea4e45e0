#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <string>

namespace {

struct Result {
  int code;
  std::string out, err;
};

std::string read(std::FILE* file) {
  std::string text;
  for (int c; (c = std::fgetc(file)) != EOF;) text += static_cast<char>(c);
  return text;
}

// Runs the program itself: exit code and what it printed.
Result entrain(const std::string& arguments) {
  const std::string errors = testing::TempDir() + "main_test.err";
  std::FILE* pipe = ::popen((ENTRAIN_BINARY " " + arguments + " 2>" + errors).c_str(), "r");
  Result result;
  result.out = read(pipe);
  result.code = WEXITSTATUS(::pclose(pipe));
  std::FILE* file = std::fopen(errors.c_str(), "r");
  result.err = read(file);
  std::fclose(file);
  return result;
}

TEST(Main, ShowsHelpWithTheExitCodes) {
  const Result help = entrain("--help");
  EXPECT_EQ(help.code, 0);
  EXPECT_NE(help.out.find("Exit codes:"), help.out.npos);
  EXPECT_NE(help.out.find("tokenize"), help.out.npos);
  EXPECT_EQ(entrain("").out, help.out);
  EXPECT_EQ(entrain("").code, 0);
}

TEST(Main, ShowsTheVersion) {
  const Result version = entrain("--version");
  EXPECT_EQ(version.code, 0);
  EXPECT_TRUE(version.out.starts_with("entrain 0.")) << version.out;
}

TEST(Main, RefusesWrongUsageInOneLine) {
  for (const char* arguments : {"trian", "--bogus", "train", "train no-such.yaml"}) {
    const Result result = entrain(arguments);
    EXPECT_EQ(result.code, 2) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_TRUE(result.err.starts_with("entrain: ")) << result.err;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
  }
  EXPECT_EQ(entrain("trian").err, "entrain: unknown command trian; did you mean train?\n");
}

}  // namespace
