#include "train/metrics.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <sstream>

#include "core/error.h"
#include "core/file.h"

namespace entrain {
namespace {

// The lines of steps up to `last`. A line counts only with its newline: the last one may be torn.
std::string lines_up_to(int64_t last, const std::string& text) {
  std::string kept;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool whole =
        json.is_object() && json.contains("step") && json["step"].is_number_integer();
    if (whole && json["step"].get<int64_t>() <= last) kept += line + '\n';
  }
  return kept;
}

}  // namespace

nlohmann::ordered_json to_json(const StepMetrics& m) {
  nlohmann::ordered_json peak_share;  // null
  if (m.peak_share > 0.0) peak_share = m.peak_share;
  return {{"step", m.step},
          {"tokens", m.tokens},
          {"loss", m.loss},
          {"lr", m.lr},
          {"grad_norm", m.grad_norm},
          {"tokens_per_second", m.tokens_per_second},
          {"flops_per_second", m.flops_per_second},
          {"peak_share", peak_share},
          {"density", m.density},
          {"router_density", m.router_density},
          {"gamma", m.gamma},
          {"alpha", m.alpha},
          {"attention_seconds", m.attention_seconds},
          {"seconds_left", m.seconds_left}};
}

MetricsWriter::MetricsWriter(const std::string& dir, int64_t step) : path_(dir + "/metrics.jsonl") {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  require(!error, "cannot create folder {}: {}", dir, error.message());
  const bool goes_on = step > 0 && std::filesystem::exists(path_);
  replace_file(path_, goes_on ? lines_up_to(step, read_file(path_)) : "");
  file_.open(path_, std::ios::app);
  require(file_.good(), "cannot write {}: {}", path_, std::strerror(errno));
}

void MetricsWriter::write(const nlohmann::ordered_json& line) {
  require(line.is_object() && line.contains("step") && line["step"].is_number_integer(),
          "a line of metrics needs a step");
  // dump() writes null for what JSON cannot say (NaN, infinities).
  using Json = nlohmann::ordered_json;
  file_ << line.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n' << std::flush;
  require(file_.good(), "cannot write {}: {}", path_, std::strerror(errno));
}

}  // namespace entrain
