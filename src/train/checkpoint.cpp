#include "train/checkpoint.h"

#include <spdlog/spdlog.h>
#include <zlib.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>

#include "core/file.h"
#include "core/h5.h"
#include "core/mirror.h"
#include "core/version.h"

namespace entrain {
namespace {

namespace fs = std::filesystem;

constexpr const char* format_name = "entrain checkpoint 1";
constexpr const char* description =
    "A training run of entrain: /parameters (Hugging Face names), /moments/m and /moments/v "
    "(AdamW), "
    "/rng; config is the run's YAML, step counts optimizer steps, sequences those taken from the "
    "data. "
    "crc32 covers a dataset's bytes, metadata_crc32 the attributes.";
const std::string controller_prefix = "controller.";

uint32_t crc(const void* data, size_t bytes) {
  return static_cast<uint32_t>(crc32_z(0, static_cast<const Bytef*>(data), bytes));
}

void write(h5::File& file, const std::string& name, Tensor tensor) {
  Mirror mirror(tensor);
  mirror.download();
  const Tensor x = mirror.host();
  file.write(name, x);
  file.set(name, "crc32", static_cast<int64_t>(crc(x.data, x.bytes())));
}

void check_crc(const h5::File& file, const std::string& name, Tensor x) {
  require(file.integer(name, "crc32") == crc(x.data, x.bytes()),
          "{} is damaged: the checksum of {} does not match; use another checkpoint", file.path(),
          name);
}

void read(const h5::File& file, const std::string& name, Tensor into) {
  Mirror mirror(into);
  file.read(name, mirror.host());
  check_crc(file, name, mirror.host());
  mirror.upload();
}

/// What params keeps of a parameter's moment, whose shard is `kept`.
void read_moment(const h5::File& file, const std::string& name, const Param& param,
                 const Params& params, Tensor kept) {
  const int64_t first = params.shard_begin(params.shard().index);
  const int64_t begin = std::max(param.begin, first);
  const int64_t end = std::min(param.begin + param.value.numel(), first + kept.numel());
  if (begin >= end) return;
  const Buffer memory(param.value.bytes(), Device::cpu);
  const Tensor whole = Tensor::of(memory.data(), param.value.shape);
  file.read(name, whole);
  check_crc(file, name, whole);
  Mirror part(kept.slice(0, begin - first, end - begin));
  std::copy_n(whole.ptr<float>() + begin - param.begin, end - begin, part.host().ptr<float>());
  part.upload();
}

CheckpointInfo read_metadata(const h5::File& file) {
  require(file.has_attribute("", "format") && file.text("", "format") == format_name,
          "{} is not a checkpoint of this version of entrain ('{}')", file.path(), format_name);
  CheckpointInfo info;
  info.state.step = file.integer("", "step");
  info.state.sequences = file.integer("", "sequences");
  for (const std::string& name : file.attributes("")) {
    if (!name.starts_with(controller_prefix)) continue;
    info.state.controller[name.substr(controller_prefix.size())] = file.number("", name);
  }
  info.config_yaml = file.text("", "config");
  info.data_fingerprint = file.text("", "data_fingerprint");
  info.code_version = file.text("", "code_version");
  info.ranks = static_cast<int>(file.integer("", "ranks"));
  for (const std::string& name : file.datasets("parameters")) {
    info.parameters.push_back({name, file.shape("parameters/" + name)});
  }
  return info;
}

// Over all that read_metadata() returns and the checksums of all datasets.
uint32_t metadata_crc(const h5::File& file, const CheckpointInfo& info) {
  std::string text =
      fmt::format("{}\n{}\n{}\n{}\n{}\n{}\n", info.state.step, info.state.sequences, info.ranks,
                  info.config_yaml, info.data_fingerprint, info.code_version);
  for (const auto& [name, value] : info.state.controller) {
    text += fmt::format("{} {}\n", name, value);
  }
  for (const std::string& name : file.datasets("")) {
    text +=
        fmt::format("{} {} {}\n", name, file.shape(name).to_string(), file.integer(name, "crc32"));
  }
  return crc(text.data(), text.size());
}

CheckpointInfo read_info(const h5::File& file) {
  CheckpointInfo info = read_metadata(file);
  require(file.integer("", "metadata_crc32") == metadata_crc(file, info),
          "{} is damaged: the checksum of its attributes does not match; use another checkpoint",
          file.path());
  read(file, "rng", Tensor::of(info.state.rng.data(), {3}, DType::u64));
  return info;
}

const CheckpointInfo::Parameter* find(const CheckpointInfo& info, const std::string& name) {
  const auto it = std::find_if(info.parameters.begin(), info.parameters.end(),
                               [&](const auto& p) { return p.name == name; });
  return it == info.parameters.end() ? nullptr : &*it;
}

bool has(const Params& params, const std::string& name) {
  return std::any_of(params.all().begin(), params.all().end(),
                     [&](const Param& p) { return p.name == name; });
}

void require_same_shape(const std::string& path, const CheckpointInfo::Parameter& saved,
                        const Param& param) {
  require(
      saved.shape == param.value.shape,
      "{} is {} in {} but {} in this model; set model and attention as in the run that wrote it",
      param.name, saved.shape.to_string(), path, param.value.shape.to_string());
}

void require_same_parameters(const std::string& path, const CheckpointInfo& info,
                             const Params& params) {
  for (const Param& param : params.all()) {
    const auto* saved = find(info, param.name);
    require(saved,
            "{} has no parameter {}, which is {} in this model; set model and attention as in the "
            "run that wrote it",
            path, param.name, param.value.shape.to_string());
    require_same_shape(path, *saved, param);
  }
  for (const auto& saved : info.parameters) {
    require(has(params, saved.name),
            "this model has no parameter {}, which is {} in {}; set model and attention as in the "
            "run that wrote it",
            saved.name, saved.shape.to_string(), path);
  }
}

void write_checkpoint(const std::string& path, const Params& params, const Moments& moments,
                      const TrainState& state, const std::string& config_yaml,
                      const std::string& data_fingerprint, int ranks) {
  h5::File file = h5::File::create(path);
  file.set("", "format", std::string(format_name));
  file.set("", "description", std::string(description));
  file.set("", "step", state.step);
  file.set("", "sequences", state.sequences);
  file.set("", "config", config_yaml);
  file.set("", "data_fingerprint", data_fingerprint);
  file.set("", "code_version", std::string(code_version()));
  file.set("", "ranks", static_cast<int64_t>(ranks));
  for (const auto& [name, value] : state.controller) {
    file.set("", controller_prefix + name, value);
  }
  auto rng = state.rng;
  write(file, "rng", Tensor::of(rng.data(), {3}, DType::u64));
  for (const Param& param : params.all()) {
    write(file, "parameters/" + param.name, param.value);
    const auto window = [&](const Tensor& flat) {
      return flat.slice(0, param.begin, param.value.numel()).view(param.value.shape);
    };
    write(file, "moments/m/" + param.name, window(moments.m));
    write(file, "moments/v/" + param.name, window(moments.v));
  }
  file.set("", "metadata_crc32", static_cast<int64_t>(metadata_crc(file, read_metadata(file))));
  file.close();
}

void remove_partial(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".partial") fs::remove(entry.path());
  }
}

// Checkpoints of a folder by step.
std::map<int64_t, fs::path> checkpoints_in(const fs::path& folder) {
  std::map<int64_t, fs::path> found;
  if (!fs::is_directory(folder)) return found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("step_") || !name.ends_with(".h5")) continue;
    const char* end = name.data() + name.size() - 3;
    int64_t step = 0;
    const auto parsed = std::from_chars(name.data() + 5, end, step);
    if (parsed.ec == std::errc() && parsed.ptr == end) found[step] = entry.path();
  }
  return found;
}

}  // namespace

std::string checkpoint_path(const std::string& run_dir, int64_t step) {
  return (fs::path(run_dir) / "checkpoints" / fmt::format("step_{:08}.h5", step)).string();
}

void save_checkpoint(const std::string& path, const Params& params, const Moments& moments,
                     const TrainState& state, const std::string& config_yaml,
                     const std::string& data_fingerprint, int ranks) {
  const fs::path folder = fs::absolute(path).parent_path();
  const std::string partial = path + ".partial";
  try {
    fs::create_directories(folder);
    remove_partial(folder);
    write_checkpoint(partial, params, moments, state, config_yaml, data_fingerprint, ranks);
    verify_checkpoint(partial);
    fs::rename(partial, path);
    sync_folder(path);
  } catch (const std::runtime_error& error) {  // Error or filesystem_error
    std::error_code ignored;
    fs::remove(partial, ignored);
    fail("no checkpoint of step {}: {}; earlier checkpoints are untouched", state.step,
         error.what());
  }
}

CheckpointInfo read_info(const std::string& path) {
  return read_info(h5::File::open(path));
}

void verify_checkpoint(const std::string& path) {
  const h5::File file = h5::File::open(path);
  read_info(file);
  for (const std::string& name : file.datasets("")) check_crc(file, name, file.read(name).tensor());
}

CheckpointInfo load_checkpoint(const std::string& path, Params& params) {
  const h5::File file = h5::File::open(path);
  CheckpointInfo info = read_info(file);
  require_same_parameters(path, info, params);
  for (const Param& param : params.all()) {
    read(file, "parameters/" + param.name, param.value);
    if (!params.m()) continue;
    read_moment(file, "moments/m/" + param.name, param, params, params.m());
    read_moment(file, "moments/v/" + param.name, param, params, params.v());
  }
  params.round();
  return info;
}

void require_tokenizer(const std::string& checkpoint, const std::string& data_fingerprint,
                       const TokenStore& store) {
  // A fingerprint begins with the vocabulary's size and the tokenizer model's checksum.
  const auto tokenizer = [](const std::string& fingerprint) {
    return fingerprint.substr(0, fingerprint.find('-', fingerprint.find('-') + 1));
  };
  require(
      tokenizer(data_fingerprint) == tokenizer(store.fingerprint()),
      "{} was trained with another tokenizer than {}'s, so its token ids mean other text; tokenize "
      "with the model of the data it was trained on",
      checkpoint, store.path());
}

Shared load_shared(const std::string& path, Params& params) {
  const h5::File file = h5::File::open(path);
  const CheckpointInfo info = read_info(file);
  Shared shared;
  const auto take = [&](const Param& param, const std::string& name) {
    const auto* saved = find(info, name);
    if (!saved) return false;
    require_same_shape(path, *saved, param);
    read(file, "parameters/" + name, param.value);
    return true;
  };
  for (const Param& param : params.all()) {
    if (take(param, param.name)) {
      shared.taken.push_back(param.name);
    } else if (param.adopt && param.adopt->like.empty()) {
      Mirror value(param.value);
      std::fill_n(value.host().ptr<float>(), param.value.numel(),
                  static_cast<float>(param.adopt->value));
      value.upload();
      shared.adopted.push_back(param.name);
    } else if (param.adopt && take(param, param.adopt->like)) {
      shared.adopted.push_back(param.name);
    } else {
      shared.fresh.push_back(param.name);
    }
  }
  for (const auto& saved : info.parameters) {
    if (!has(params, saved.name)) shared.unused.push_back(saved.name);
  }
  params.round();
  return shared;
}

std::optional<std::string> newest_valid(const std::string& folder) {
  const auto found = checkpoints_in(folder);
  for (auto it = found.rbegin(); it != found.rend(); ++it) {
    try {
      verify_checkpoint(it->second);
      return it->second.string();
    } catch (const Error& error) {
      spdlog::warn("skipping a checkpoint: {}", error.what());
    }
  }
  require(found.empty(), "all checkpoints in {} are damaged; move them away to start from step 0",
          folder);
  return std::nullopt;
}

std::string find_checkpoint(const std::string& file_or_run) {
  if (!fs::is_directory(file_or_run)) return file_or_run;
  const auto folder = (fs::path(file_or_run) / "checkpoints").string();
  const auto newest = newest_valid(folder);
  require(newest.has_value(), "{} has no checkpoint", folder);
  return *newest;
}

void prune(const std::string& newest, int keep) {
  if (keep == 0) return;
  const auto found = checkpoints_in(fs::absolute(newest).parent_path());
  auto it = std::find_if(found.rbegin(), found.rend(), [&](const auto& step_and_path) {
    return step_and_path.second.filename() == fs::path(newest).filename();
  });
  for (; it != found.rend() && keep > 0; --keep) ++it;
  for (; it != found.rend(); ++it) fs::remove(it->second);
}

}  // namespace entrain
