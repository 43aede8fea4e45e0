#include "train/device.h"

#include <spdlog/spdlog.h>

#include <algorithm>

#include "core/gpu.h"
#include "dist/nccl.h"
#include "train/config.h"
#include "train/together.h"

namespace entrain {
namespace {

void require_known(const std::string& name) {
  if (name == "auto" || name == "cpu" || name == "cuda") return;
  throw ConfigError(fmt::format("device {} is not auto, cpu or cuda", name));
}

[[noreturn]] void refuse(const std::string& why) {
  throw ConfigError(fmt::format("no GPU to compute on: {}; choose the device cpu or auto", why));
}

/// The first rank that takes the same GPU: processes may see different ones under the same number,
/// as srun deals them.
int owner(const gpu::Uuid& mine, Comm& launcher) {
  int owner = launcher.rank();
  for (int rank = launcher.size() - 1; rank >= 0; --rank) {
    gpu::Uuid theirs = mine;
    launcher.broadcast(theirs.data(), theirs.size(), rank);
    if (theirs == mine) owner = std::min(owner, rank);
  }
  return owner;
}

/// Takes a GPU for each rank. Returns why that cannot be, the same on all ranks, or an empty text.
std::string take_gpus(Comm& launcher) {
  const int count = gpu::count();
  const int index = count > 0 ? launcher.local_rank() % count : 0;
  gpu::Uuid mine{};
  std::string why;
  together(launcher, [&] {
    if (count > 0) mine = gpu::uuid(index);
  });
  const int first = owner(mine, launcher);
  together(launcher, [&] {
    if (count > 0 && first != launcher.rank()) {
      why = fmt::format("rank {} would share rank {}'s; start no more ranks on a host than it has",
                        launcher.rank(), first);
      return;
    }
    if (count > 0) gpu::use(index);  // before why_unavailable(), which starts to use it
    why = gpu::why_unavailable();
  });
  double lacking = why.empty() ? 0 : launcher.size() - launcher.rank();  // largest: the lowest rank
  launcher.max(&lacking, 1);
  if (lacking > 0) broadcast(launcher, why, launcher.size() - static_cast<int>(lacking));
  return why;
}

}  // namespace

Device choose_device(const std::string& name) {
  require_known(name);
  if (name == "cpu") return Device::cpu;
  if (name == "cuda" && !gpu::available()) refuse(gpu::why_unavailable());
  return gpu::available() ? Device::cuda : Device::cpu;
}

std::unique_ptr<Comm> place_ranks(const std::string& name, std::unique_ptr<Comm> launcher) {
  together(*launcher, [&] { require_known(name); });
  if (name == "cpu") return launcher;
  const std::string why = take_gpus(*launcher);
  if (why.empty()) return make_gpu_comm(std::move(launcher));
  together(*launcher, [&] {
    if (name == "cuda") refuse(why);
  });
  if (gpu::count() > 0 && launcher->rank() == 0) {
    spdlog::warn("all ranks compute on the CPU, as not each has a GPU: {}", why);
  }
  return launcher;
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
