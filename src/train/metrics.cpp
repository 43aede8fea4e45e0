#include "train/metrics.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <sstream>

#include "core/error.h"
#include "core/file.h"

namespace entrain {
namespace {

using Json = nlohmann::ordered_json;

// Calls f(line, its JSON) for each whole line. A line counts only with its newline: the last one
// may be torn.
template <class F>
void for_each_line(const std::string& text, F&& f) {
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool whole =
        json.is_object() && json.contains("step") && json["step"].is_number_integer();
    if (whole) f(line, std::move(json));
  }
}

// The lines of steps up to `last`.
std::string lines_up_to(int64_t last, const std::string& text) {
  std::string kept;
  for_each_line(text, [&](const std::string& line, const Json& json) {
    if (json["step"].get<int64_t>() <= last) kept += line + '\n';
  });
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
          {"waiting_seconds", m.waiting_seconds},
          {"seconds_left", m.seconds_left}};
}

std::vector<Json> read_metric_lines(const std::string& dir) {
  std::vector<Json> lines;
  for_each_line(read_file(dir + "/metrics.jsonl"),
                [&](const std::string&, Json json) { lines.push_back(std::move(json)); });
  return lines;
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
  file_ << line.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n' << std::flush;
  require(file_.good(), "cannot write {}: {}", path_, std::strerror(errno));
}

}  // namespace entrain
