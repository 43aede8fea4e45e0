// The communicator of GPUs (dist/nccl.h). Sums of gradients run on a stream of their own that forks
// from the process's stream and joins it again by events, which a graph captures as edges; all else
// runs on the process's stream. So calls of NCCL follow each other in the same order on all ranks.
#include "dist/nccl.h"

#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "core/arena.h"
#include "core/gpu.h"
#include "core/mirror.h"
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using cuda::check;

// Through which host values travel.
constexpr int64_t staging_bytes = int64_t{1} << 22;

std::string reason(ncclResult_t status, ncclComm_t comm) {
  const char* detail = ncclGetLastError(comm);
  return fmt::format("{}{}{}", ncclGetErrorString(status), *detail ? ": " : "", detail);
}

void check(ncclResult_t status, const char* what, ncclComm_t comm = nullptr) {
  if (status != ncclSuccess) fail("NCCL: {}: {}", what, reason(status, comm));
}

/// Keeps signals from threads that start while it lives: the main thread handles them.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignals(const NoSignals&) = delete;
  NoSignals& operator=(const NoSignals&) = delete;

 private:
  sigset_t before_;
};

/// Looks at a communicator now and then. What waits for a lost rank would wait for ever, in places
/// that cannot look themselves, so the process ends here; that ends the others.
class Watch {
 public:
  Watch(ncclComm_t comm, int rank)
      : thread_([comm, rank](const std::stop_token& stop) {
          std::mutex mutex;
          std::condition_variable_any changed;
          std::unique_lock lock(mutex);
          while (!changed.wait_for(lock, stop, std::chrono::milliseconds(500),
                                   [&] { return stop.stop_requested(); })) {
            look(comm, rank);
          }
        }) {}

 private:
  static void look(ncclComm_t comm, int rank) {
    ncclResult_t state = ncclSuccess;
    ncclCommGetAsyncError(comm, &state);
    if (state == ncclSuccess || state == ncclInProgress) return;
    const std::string line =
        fmt::format("entrain: rank {} lost the others (NCCL: {})\n", rank, reason(state, comm));
    std::fwrite(line.data(), 1, line.size(), stderr);
    std::_Exit(EXIT_FAILURE);
  }

  std::jthread thread_;
};

class NcclComm final : public Comm {
 public:
  explicit NcclComm(std::unique_ptr<Comm> launcher)
      : launcher_(std::move(launcher)),
        staging_memory_(staging_bytes, Device::cuda),
        staging_(Tensor::of(staging_memory_.data(), {staging_bytes}, DType::u8, Device::cuda)) {
    // Sums within the switch (NVLS) promise no order; rings and trees have one.
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    const NoSignals scope;
    ncclUniqueId id;
    if (rank() == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    launcher_->broadcast(&id, sizeof id, 0);
    check(ncclCommInitRank(&comm_, size(), id, rank()), "ncclCommInitRank");
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&sums_, cudaStreamNonBlocking, greatest),
          "cudaStreamCreate");
    for (cudaEvent_t* event : {&fork_, &join_}) {
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
    }
    watch_.emplace(comm_, rank());
  }

  // A rank that fails alone must not wait for the others.
  ~NcclComm() override {
    watch_.reset();
    if (std::uncaught_exceptions() == 0 || all_fail_) ncclCommDestroy(comm_);
  }

  int rank() const override { return launcher_->rank(); }
  int size() const override { return launcher_->size(); }
  int local_rank() const override { return launcher_->local_rank(); }
  Device device() const override { return Device::cuda; }

  void start_sum(Tensor x) override {
    require(x.contiguous(), "only contiguous tensors can be summed over ranks");
    float* values = cuda::pointer<float>(x);
    follow(sums_, fork_, cuda::stream());
    check(ncclAllReduce(values, values, static_cast<size_t>(x.numel()), ncclFloat, ncclSum, comm_,
                        sums_),
          "ncclAllReduce", comm_);
    summing_ = true;
  }

  void wait() override {
    if (summing_) follow(cuda::stream(), join_, sums_);
    summing_ = false;
  }

  void gather(Tensor rows) override {
    require(rows.contiguous() && rows[0] == size(), "every rank gathers one row");
    const Tensor row = rows.slice(0, rank(), 1);
    check(ncclAllGather(row.data, rows.data, row.bytes(), ncclUint8, comm_, cuda::stream()),
          "ncclAllGather", comm_);
  }

  void sum(double* values, int count) override { reduce(values, count, ncclSum); }
  void max(double* values, int count) override { reduce(values, count, ncclMax); }

  void broadcast(void* data, size_t bytes, int root) override {
    staged(data, static_cast<int64_t>(bytes), [&](void* part, size_t n) {
      check(ncclBroadcast(part, part, n, ncclUint8, root, comm_, cuda::stream()), "ncclBroadcast",
            comm_);
    });
  }

  void fail_together() override {
    all_fail_ = true;
    launcher_->fail_together();
  }
  bool recover() override {
    all_fail_ = false;
    return launcher_->recover();
  }

 private:
  /// What comes next on `stream` follows what is on `other` now.
  static void follow(cudaStream_t stream, cudaEvent_t event, cudaStream_t other) {
    check(cudaEventRecord(event, other), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream, event), "cudaStreamWaitEvent");
  }

  void reduce(double* values, int count, ncclRedOp_t operation) {
    staged(values, static_cast<int64_t>(count) * int64_t{sizeof(double)},
           [&](void* part, size_t n) {
             check(ncclAllReduce(part, part, n / sizeof(double), ncclDouble, operation, comm_,
                                 cuda::stream()),
                   "ncclAllReduce", comm_);
           });
  }

  /// Takes host memory to the GPU and back in parts, with f(part, bytes) in between.
  template <class F>
  void staged(void* data, int64_t bytes, F f) {
    for (int64_t at = 0; at < bytes; at += staging_bytes) {
      const auto n = static_cast<size_t>(std::min(staging_bytes, bytes - at));
      auto* host = static_cast<std::byte*>(data) + at;
      std::memcpy(pinned_.host().data, host, n);
      gpu::to_device(staging_.data, pinned_.host().data, n);
      f(staging_.data, n);
      gpu::to_host(pinned_.host().data, staging_.data, n);
      gpu::synchronize();
      std::memcpy(host, pinned_.host().data, n);
    }
  }

  std::unique_ptr<Comm> launcher_;
  Buffer staging_memory_;
  Tensor staging_;
  Pinned pinned_{{staging_bytes}, DType::u8};
  ncclComm_t comm_ = nullptr;
  cudaStream_t sums_ = nullptr;
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
  bool summing_ = false;  // since the last wait()
  bool all_fail_ = false;
  std::optional<Watch> watch_;
};

}  // namespace

std::unique_ptr<Comm> make_gpu_comm(std::unique_ptr<Comm> launcher) {
  return std::make_unique<NcclComm>(std::move(launcher));
}

}  // namespace entrain
