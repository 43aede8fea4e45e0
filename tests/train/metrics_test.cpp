#include "train/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "core/error.h"
#include "core/file.h"

namespace entrain {
namespace {

class Metrics : public testing::Test {
 protected:
  Metrics() { std::filesystem::remove_all(dir_); }

  std::string text() const { return read_file(dir_ + "/metrics.jsonl"); }

  static nlohmann::ordered_json line(int64_t step) { return {{"step", step}, {"loss", 2.5}}; }

  std::string dir_ = testing::TempDir() + "metrics_test_" +
                     testing::UnitTest::GetInstance()->current_test_info()->name() + "/sub";
};

TEST_F(Metrics, WritesOneObjectALineAtOnce) {
  MetricsWriter writer(dir_, 0);
  writer.write(line(1));
  EXPECT_EQ(text(), "{\"step\":1,\"loss\":2.5}\n");
  writer.write(line(2));
  EXPECT_EQ(text(), "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":2.5}\n");
}

TEST_F(Metrics, AResumedRunRepeatsNoStep) {
  {
    MetricsWriter writer(dir_, 0);
    for (int64_t step = 1; step <= 5; ++step) writer.write(line(step));
  }
  MetricsWriter writer(dir_, 3);
  EXPECT_EQ(text(),
            "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":2.5}\n"
            "{\"step\":3,\"loss\":2.5}\n");
  writer.write(line(4));
  EXPECT_TRUE(text().ends_with("{\"step\":3,\"loss\":2.5}\n{\"step\":4,\"loss\":2.5}\n"));
}

TEST_F(Metrics, DropsATornLine) {
  std::filesystem::create_directories(dir_);
  replace_file(dir_ + "/metrics.jsonl", "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"lo");
  { MetricsWriter writer(dir_, 9); }
  EXPECT_EQ(text(), "{\"step\":1}\n{\"step\":2}\n");
  // Torn before its newline, a line may still read as JSON.
  replace_file(dir_ + "/metrics.jsonl", "{\"step\":1}\n{\"step\":2}");
  { MetricsWriter writer(dir_, 9); }
  EXPECT_EQ(text(), "{\"step\":1}\n");
  replace_file(dir_ + "/metrics.jsonl", std::string("{\"step\":1}\n\0\0\0\n", 15));
  { MetricsWriter writer(dir_, 9); }
  EXPECT_EQ(text(), "{\"step\":1}\n");
}

TEST_F(Metrics, ANewRunStartsAnew) {
  { MetricsWriter(dir_, 0).write(line(0)); }
  MetricsWriter writer(dir_, 0);
  EXPECT_EQ(text(), "");
}

TEST_F(Metrics, NonFiniteValuesStayValidJson) {
  StepMetrics metrics;
  metrics.step = 7;
  metrics.loss = std::nan("");
  metrics.grad_norm = std::numeric_limits<double>::infinity();
  metrics.lr = 1.0 / 3.0;
  MetricsWriter(dir_, 0).write(to_json(metrics));
  const auto json = nlohmann::json::parse(text());
  EXPECT_EQ(json["step"], 7);
  EXPECT_TRUE(json["loss"].is_null());
  EXPECT_TRUE(json["grad_norm"].is_null());
  EXPECT_TRUE(json["peak_share"].is_null());
  EXPECT_EQ(json["lr"], 1.0 / 3.0);
}

TEST_F(Metrics, RefusesALineWithoutAStep) {
  MetricsWriter writer(dir_, 0);
  EXPECT_THROW(writer.write({{"loss", 1.0}}), Error);
  EXPECT_EQ(text(), "");
}

TEST_F(Metrics, NamesAFolderThatCannotBeMade) {
  try {
    MetricsWriter writer("/dev/null/run", 0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "cannot create folder /dev/null/run: Not a directory");
  }
}

}  // namespace
}  // namespace entrain
