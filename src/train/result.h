#pragma once
// What a run of a study came to: RUN.DIR/result.json, written when it is trained and evaluated.
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "train/evaluate_run.h"
#include "train/study.h"

namespace entrain {

/// The result of a run that was trained to its end, from its evaluation and its metrics: `protocol`
/// of its study, `name`, `varied`, `config` (YAML), `data_fingerprint`, the evaluation under
/// `eval`, and the values that tables show, by the names of result_values(). Throws Error where the
/// metrics cannot be read.
nlohmann::ordered_json make_result(const Study& study, const StudyRun& run,
                                   const RunEvaluation& evaluation);

/// Names of texts and numbers, in the order in which tables show them. A result lacks what was not
/// measured; what is not finite is null.
const std::vector<const char*>& result_values();

/// The result in a run's folder; nothing where there is none or it is not whole.
std::optional<nlohmann::ordered_json> read_result(const std::string& run_dir);
void write_result(const std::string& run_dir, const nlohmann::ordered_json& result);

/// The steps among the lines of a run's metrics. Throws Error where there are none.
std::vector<nlohmann::ordered_json> read_training(const std::string& run_dir);

}  // namespace entrain
