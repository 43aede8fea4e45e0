#include "train/result.h"

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "core/file.h"
#include "core/median.h"
#include "train/metrics.h"

namespace entrain {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* format_name = "entrain result 1";

std::vector<double> values_of(const std::vector<Json>& lines, const char* key) {
  std::vector<double> values;
  for (const Json& line : lines) {
    if (line.contains(key) && line[key].is_number()) values.push_back(line[key].get<double>());
  }
  return values;
}

// Over the whole run, however often it was resumed.
void add_training(Json& result, const RunConfig& config, int ranks) {
  const std::vector<Json> steps = read_training(config.dir);
  const double sequences = config.train.global_batch;
  result["train_tokens"] = steps.back().value("tokens", Json());
  const std::vector<double> rates = values_of(steps, "tokens_per_second");
  if (!rates.empty()) result["train_tokens_per_second"] = median(rates);
  const std::vector<Json> lines = read_metric_lines(config.dir);
  const std::vector<double> seconds = values_of(lines, "seconds");
  if (!seconds.empty()) {
    result["wall_seconds"] = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  }
  const std::vector<double> peaks = values_of(lines, "peak_memory_bytes");
  if (!peaks.empty()) result["peak_memory_bytes"] = static_cast<int64_t>(std::ranges::max(peaks));
  const std::vector<double> attention = values_of(steps, "attention_seconds");
  // Ranks work side by side, each on its share of the step's sequences.
  if (!attention.empty()) result["attention_ms"] = 1000 * median(attention) * ranks / sequences;
}

// What tables and figures cannot do without.
bool is_evaluation(const Json& eval) {
  const auto is_list = [&](const char* key) {
    return eval.contains(key) && eval[key].is_array() && !eval[key].empty();
  };
  return eval.is_object() && is_list("layers") && is_list("loss_by_position");
}

}  // namespace

const std::vector<const char*>& result_values() {
  static const std::vector<const char*> names{"method",
                                              "role",
                                              "seed",
                                              "init_from",
                                              "ranks",
                                              "code_version",
                                              "seq_len",
                                              "steps",
                                              "train_tokens",
                                              "loss",
                                              "perplexity",
                                              "density",
                                              "router_density",
                                              "active_blocks",
                                              "train_tokens_per_second",
                                              "eval_tokens_per_second",
                                              "wall_seconds",
                                              "peak_memory_bytes",
                                              "attention_ms",
                                              "routing_entropy",
                                              "answers",
                                              "recall_accuracy"};
  return names;
}

Json make_result(const Study& study, const StudyRun& run, const RunEvaluation& evaluation) {
  const Json eval = to_json(evaluation.result);
  Json result{{"format", format_name},
              {"protocol", study.protocol},
              {"name", run.name},
              {"method", run.config.attention.method},
              {"role", run.dense ? "dense" : "compared"},
              {"seed", run.config.train.seed},
              {"varied", run.varied},
              {"init_from", run.init_from},
              {"ranks", evaluation.info.ranks},
              {"code_version", evaluation.info.code_version},
              {"data_fingerprint", evaluation.info.data_fingerprint},
              {"seq_len", run.config.data.seq_len},
              {"steps", evaluation.info.state.step}};
  add_training(result, run.config, evaluation.info.ranks);
  for (const char* key : result_values()) {
    if (eval.contains(key)) result[key] = eval[key];
  }
  result["eval_tokens_per_second"] = eval.at("tokens_per_second");
  result["config"] = evaluation.info.config_yaml;
  result["eval"] = eval;
  return result;
}

std::optional<Json> read_result(const std::string& run_dir) {
  const std::string path = run_dir + "/result.json";
  if (!std::filesystem::exists(path)) return {};
  Json result = Json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  const auto is_text = [&](const char* key) {
    return result.contains(key) && result[key].is_string();
  };
  const bool whole = result.is_object() && is_text("format") && result["format"] == format_name &&
                     is_text("protocol") && is_text("name") && is_text("config") &&
                     is_text("data_fingerprint") && result.contains("varied") &&
                     result.contains("eval") && is_evaluation(result["eval"]);
  if (!whole) return {};
  return result;
}

void write_result(const std::string& run_dir, const Json& result) {
  replace_file(run_dir + "/result.json",
               result.dump(1, ' ', false, Json::error_handler_t::replace) + '\n');
}

std::vector<Json> read_training(const std::string& run_dir) {
  std::vector<Json> lines = read_metric_lines(run_dir);
  std::erase_if(lines, [](const Json& line) { return !line.contains("loss"); });
  require(!lines.empty(), "{}/metrics.jsonl has no training step; remove the folder to train anew",
          run_dir);
  return lines;
}

}  // namespace entrain
