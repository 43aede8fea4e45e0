// entrain op METHOD --in x.h5 --out y.h5: one operation on tensors from a file, so that our code
// can be held against anyone else's. A group of the file is a case: attributes are parameters, in/*
// the inputs; out/* and, where in/dout is given, grad/* are written.
#include "cli/op.h"

#include <filesystem>
#include <map>

#include "cli/commands.h"
#include "core/file.h"
#include "train/config.h"
#include "train/device.h"

namespace entrain::cli {
namespace {

const std::map<std::string, void (*)(Case&)> operations = {
    {"entmax", run_entmax}, {"full", run_full},         {"dash", run_dash},
    {"nsa", run_nsa},       {"infllmv2", run_infllmv2}, {"model", run_model}};

struct Options {
  std::string operation, in, out, device = "auto", dtype;
};

/// The type of the arithmetic; without a word, the definition's, or the GPU's likest.
DType dtype_of(const Options& options, Device device) {
  if (options.dtype == "f64") {
    if (device == Device::cuda)
      throw ConfigError("--dtype f64 is the CPU's; the GPU has f32 and bf16");
    return DType::f64;
  }
  if (options.dtype == "bf16") {
    if (device == Device::cpu)
      throw ConfigError("--dtype bf16 is the GPU's; the CPU has f64 and f32");
    return DType::bf16;
  }
  return options.dtype == "f32" || device == Device::cuda ? DType::f32 : DType::f64;
}

void run(const Options& options) {
  require(!std::filesystem::exists(options.out) ||
              !std::filesystem::equivalent(options.in, options.out),
          "--in and --out are the same file {}", options.in);
  require_replaceable(options.out);
  const Device device = choose_device(options.device);
  const DType dtype = dtype_of(options, device);
  const h5::File in = h5::File::open(options.in);
  const std::string partial = options.out + ".partial";
  const std::vector<std::string> groups = in.groups();
  require(!groups.empty(), "{} has no groups; each is a case with in/* tensors", options.in);
  h5::File out = h5::File::create(partial);
  try {
    for (const std::string& group : groups) {
      Case c(in, group, device, dtype);
      operations.at(options.operation)(c);
      c.write(out);
    }
    out.close();
    std::filesystem::rename(partial, options.out);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    throw;
  }
}

}  // namespace

void add_op(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* op = app.add_subcommand("op", "Run one operation on tensors from an HDF5 file");
  std::vector<std::string> names;
  names.reserve(operations.size());
  for (const auto& [name, f] : operations) names.push_back(name);
  op->add_option("operation", options->operation, "entmax, full, dash, nsa, infllmv2 or model")
      ->required()
      ->check(CLI::IsMember(names));
  op->add_option("--in", options->in, "groups with in/* tensors and parameters as attributes")
      ->required();
  op->add_option("--out", options->out, "gets out/* and, where in/dout is given, grad/*")
      ->required();
  add_device(*op, options->device);
  op->add_option(
        "--dtype", options->dtype,
        "arithmetic: f64, the definition (the CPU's default), f32 (the GPU's), or bf16, what "
        "training uses on the GPU")
      ->check(CLI::IsMember({"f64", "f32", "bf16"}));
  op->footer("Example: entrain op dash --in dash.h5 --out mine.h5");
  op->callback([options] { run(*options); });
}

}  // namespace entrain::cli
