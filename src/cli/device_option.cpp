#include "cli/commands.h"

namespace entrain::cli {

void add_device(CLI::App& app, std::string& device) {
  app.add_option("--device", device, "auto, cpu or cuda; auto: the GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
}

std::vector<std::string> with_device(std::vector<std::string> overrides,
                                     const std::string& device) {
  if (!device.empty()) overrides.push_back("run.device=" + device);
  return overrides;
}

}  // namespace entrain::cli
