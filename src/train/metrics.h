#pragma once
// What a run measures, one JSON object a line in run.dir/metrics.jsonl.
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace entrain {

/// One training step; every value is over all ranks.
struct StepMetrics {
  int64_t step = 0, steps = 0;  // done, of the run
  int64_t tokens = 0;           // trained on since the run began
  double loss = 0.0;            // nats a token
  double lr = 0.0;
  double grad_norm = 0.0;  // before clipping
  double tokens_per_second = 0.0;
  double flops_per_second = 0.0;
  // flops_per_second over the rate of a float32 matrix product, all ranks together, as measured
  // once before the run: beyond 1 where the machine was busy then. 0: unknown.
  double peak_share = 0.0;
  double density = 0.0;         // share of the causal tokens that were attended
  double router_density = 0.0;  // entries the router read, over the same denominator
  double gamma = 0.0;           // of the router; 0: it has none
  double alpha = 0.0;
  double attention_seconds = 0.0;  // of the step: forward and backward, mean of the ranks
  // Of the step: when a rank had nothing to do until other ranks' gradients or parameters came,
  // mean of the ranks. Sums that run beside the backward pass do not count.
  double waiting_seconds = 0.0;
  double seconds_left = 0.0;
};

/// The names above as keys, without `steps`. Unknown and non-finite values become null.
nlohmann::ordered_json to_json(const StepMetrics& metrics);

/// The whole lines of dir/metrics.jsonl. Throws Error when there is no such file.
std::vector<nlohmann::ordered_json> read_metric_lines(const std::string& dir);

class MetricsWriter {
 public:
  /// Opens dir/metrics.jsonl for a run that goes on after `step`: lines of later steps, and
  /// whatever a crash left half written, are cut off at once. Step 0 starts the file anew. Creates
  /// the folder.
  MetricsWriter(const std::string& dir, int64_t step);

  /// Appends one line and flushes it. It needs a whole number under "step". Throws Error, also when
  /// the disk is full.
  void write(const nlohmann::ordered_json& line);

 private:
  std::string path_;
  std::ofstream file_;
};

}  // namespace entrain
