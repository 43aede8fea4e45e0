#include "train/results.h"

#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/file.h"
#include "core/h5.h"
#include "core/version.h"
#include "train/result.h"

namespace entrain {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* description =
    "A study of entrain: /runs/NAME is a run, its attributes what it came to (loss in nats a "
    "token; "
    "attention_ms forward and backward of one sequence, wall_seconds of training and evaluating on "
    "the way, routing_entropy in nats). eval: tables by position, whose attribute columns names "
    "their columns, and what attention read per layer and key-value head; training: a value a "
    "step. "
    "contents_crc32 covers the results that this file was made from.";

struct RunResult {
  std::string dir;
  Json result;
};

std::vector<RunResult> read_results(const Study& study) {
  std::vector<RunResult> results;
  for (const StudyRun& run : study.runs) {
    std::optional<Json> result = read_result(run.config.dir);
    const bool own = result && result->at("name") == run.name;
    if (own) results.push_back({run.config.dir, std::move(*result)});  // else a copy of another's
  }
  return results;
}

// All that the file says but what wrote it, which alone is no reason to write it again.
int64_t contents_of(const Study& study, const std::vector<RunResult>& results) {
  std::string text = study.protocol + '\n' + study.yaml;
  for (const RunResult& run : results) text += '\n' + run.result.dump();
  return static_cast<int64_t>(crc32_z(0, reinterpret_cast<const Bytef*>(text.data()), text.size()));
}

bool has_contents(const std::string& path, int64_t contents) {
  if (!fs::exists(path)) return false;
  try {
    const h5::File file = h5::File::open(path);
    return file.has_attribute("", "contents_crc32") &&
           file.integer("", "contents_crc32") == contents;
  } catch (const Error&) {  // damaged
    return false;
  }
}

double number(const Json& value) {
  return value.is_number() ? value.get<double>() : NAN;
}

void set(h5::File& file, const std::string& group, const char* name, const Json& value) {
  if (value.is_string()) {
    file.set(group, name, value.get<std::string>());
  } else if (value.is_number_integer()) {
    file.set(group, name, value.get<int64_t>());
  } else {
    file.set(group, name, number(value));
  }
}

void write(h5::File& file, const std::string& name, std::vector<double> values, Shape shape) {
  file.write(name, Tensor::of(values.data(), shape, DType::f64));
}

// One row an object, its members in their order.
void write_rows(h5::File& file, const std::string& name, const Json& objects) {
  std::vector<double> values;
  std::string columns;
  for (const Json& object : objects) {
    for (const Json& value : object) values.push_back(number(value));
  }
  for (const auto& [column, value] : objects.at(0).items()) {
    columns += (columns.empty() ? "" : ", ") + column;
  }
  write(file, name, std::move(values), {std::ssize(objects), std::ssize(objects.at(0))});
  file.set(name, "columns", columns);
}

void write_eval(h5::File& file, const std::string& group, const Json& eval) {
  write_rows(file, group + "/loss_by_position", eval.at("loss_by_position"));
  if (eval.contains("routing")) write_rows(file, group + "/routing", eval["routing"]);
  const Json& layers = eval.at("layers");
  for (const char* key : {"density", "router_density", "active_blocks"}) {
    std::vector<double> values;
    for (const Json& layer : layers) {
      for (const Json& head : layer) values.push_back(number(head.at(key)));
    }
    write(file, group + "/" + key, std::move(values),
          {std::ssize(layers), std::ssize(layers.at(0))});
  }
}

void write_training(h5::File& file, const std::string& group, const std::string& dir) {
  const std::vector<Json> steps = read_training(dir);
  for (const char* key : {"step", "loss", "density", "tokens_per_second"}) {
    std::vector<double> values;
    values.reserve(steps.size());
    for (const Json& step : steps) values.push_back(number(step.value(key, Json())));
    write(file, group + "/" + key, std::move(values), {std::ssize(steps)});
  }
}

void write_h5(const std::string& path, const Study& study, const std::vector<RunResult>& results,
              int64_t contents) {
  h5::File file = h5::File::create(path);
  file.set("", "format", std::string("entrain study 1"));
  file.set("", "description", std::string(description));
  file.set("", "protocol", study.protocol);
  file.set("", "code_version", std::string(code_version()));
  file.set("", "study", study.yaml);
  file.set("", "contents_crc32", contents);
  for (const auto& [dir, result] : results) {
    const std::string group = "runs/" + result.at("name").get<std::string>();
    for (const char* name : result_values()) {
      if (result.contains(name)) set(file, group, name, result[name]);
    }
    file.set(group, "varied", result.at("varied").dump());
    file.set(group, "config", result.at("config").get<std::string>());
    write_eval(file, group + "/eval", result.at("eval"));
    write_training(file, group + "/training", dir);
  }
  file.close();
}

// RFC 4180: quoted where it holds a comma, a quote or a line break.
std::string cell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == text.npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + '"';
}

std::string cell(const Json& result, const char* name) {
  if (!result.contains(name)) return "";
  const Json& value = result[name];
  return value.is_null() ? "nan"
                         : cell(value.is_string() ? value.get<std::string>() : value.dump());
}

std::string to_csv(const std::vector<RunResult>& results) {
  std::string text = "run,varied";
  for (const char* name : result_values()) text += fmt::format(",{}", name);
  text += '\n';
  for (const RunResult& run : results) {
    text += cell(run.result, "name") + ',' + cell(run.result, "varied");
    for (const char* name : result_values()) text += ',' + cell(run.result, name);
    text += '\n';
  }
  return text;
}

}  // namespace

void write_results(const Study& study) {
  const std::vector<RunResult> results = read_results(study);
  if (results.empty()) return;
  const std::string path = study.dir + "/results.h5", beside = path + ".partial";
  const int64_t contents = contents_of(study, results);
  if (!has_contents(path, contents)) {
    try {
      write_h5(beside, study, results, contents);
      fs::rename(beside, path);
    } catch (const std::exception& error) {  // Error, filesystem_error, a member JSON lacks
      std::error_code ignored;
      fs::remove(beside, ignored);
      fail("{} was not written and is as before: {}", path, error.what());
    }
    sync_folder(path);
  }
  const std::string csv = study.dir + "/results.csv", text = to_csv(results);
  if (!fs::exists(csv) || read_file(csv) != text) replace_file(csv, text);
}

}  // namespace entrain
