#include "train/device.h"

#include "core/gpu.h"
#include "train/config.h"

namespace entrain {

Device choose_device(const std::string& name) {
  if (name == "cpu") return Device::cpu;
  if (name == "cuda") {
    if (gpu::available()) return Device::cuda;
    throw ConfigError(fmt::format("no GPU to compute on: {}; choose the device cpu or auto",
                                  gpu::why_unavailable()));
  }
  if (name != "auto") throw ConfigError(fmt::format("device {} is not auto, cpu or cuda", name));
  return gpu::available() ? Device::cuda : Device::cpu;
}

DType choose_dtype(const std::string& name, Device device) {
  if (name == "f32") return DType::f32;
  if (name != "auto" && name != "bf16") {
    throw ConfigError(fmt::format("run.dtype {} is not auto, f32 or bf16", name));
  }
  if (device == Device::cuda) return DType::bf16;
  if (name == "bf16") {
    throw ConfigError("run.dtype bf16 is the GPU's; the CPU computes in f32: take f32 or auto");
  }
  return DType::f32;
}

}  // namespace entrain
