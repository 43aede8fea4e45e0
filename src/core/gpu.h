#pragma once
// The GPU of this process, as code without CUDA headers sees it. Everything of a process runs in
// order on one stream; functions that say so wait for it. A build without CUDA links
// kernels/no_cuda instead: there is no GPU then, and whatever needs one throws.
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace entrain::gpu {

/// Whether there is a GPU to use, and if not, why: no CUDA in this build, no device, an old driver.
bool available();
std::string why_unavailable();

struct Info {
  std::string name;          // "NVIDIA H100 80GB HBM3"
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int driver = 0, runtime = 0;  // CUDA versions, 13000 for 13.0
  size_t free_bytes = 0, total_bytes = 0;
};
Info info();

/// The GPUs this process sees, and the choice of one, before anything else here is used.
int count();
void use(int index);
/// What no two GPUs share, whatever number processes know them by.
using Uuid = std::array<uint8_t, 16>;
Uuid uuid(int index);

/// Zero-initialised memory. Throws OutOfMemory that says what was asked for and what was free.
void* allocate(size_t bytes);
void release(void* memory) noexcept;
/// Host memory that copies overlap with; not initialised.
void* allocate_pinned(size_t bytes);
void release_pinned(void* memory) noexcept;

/// Copies in stream order. to_device may return before `from` was read where that is pinned.
void to_device(void* to, const void* from, size_t bytes);
/// Starts the copy; `to` holds it after synchronize() (or an Event).
void to_host(void* to, const void* from, size_t bytes);
void copy(void* to, const void* from, size_t bytes);
void zero(void* memory, size_t bytes);
/// Floats to bf16, to nearest.
void round_to_bf16(void* to, const void* from, size_t count);

/// Waits until all work so far is done. Throws Error where some of it failed.
void synchronize();

/// Something of CUDA's, with what destroys it.
using Handle = std::unique_ptr<void, void (*)(void*)>;

/// A point in the stream's work, for timing; may be recorded within a Graph.
class Event {
 public:
  Event();

  void record();
  void wait() const;  // the host waits for it
  /// Seconds from `begin` to this, both passed.
  double seconds_since(const Event& begin) const;

 private:
  Handle event_;
};

/// Work that is recorded once and launched many times as one.
class Graph {
 public:
  explicit operator bool() const { return graph_ != nullptr; }
  /// Records what f starts, without running it.
  void capture(const std::function<void()>& f);
  void launch() const;

 private:
  Handle graph_{nullptr, nullptr};
};

}  // namespace entrain::gpu
