// The GPU of the process: memory, copies, events and graphs on its one stream (core/gpu.h), and
// what the kernels share of it.
#include <cstdio>
#include <utility>

#include "core/gpu.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/errors.h"

namespace entrain {
namespace cuda {
namespace {

/// Made when first used, on the device chosen by then; lives as long as the process.
struct Context {
  cudaStream_t stream = nullptr;
  double* constants = nullptr;  // see on_device()
  int multiprocessors = 0;

  Context() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaMalloc(&constants, 8 * sizeof(double)), "cudaMalloc");
  }
};

Context& context() {
  static Context context;
  return context;
}

bool capturing() {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream(), &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusActive;
}

// Four elements a thread; the flat buffers of parameters are aligned to 256 bytes.
__global__ void round_kernel(const float* from, bf16* to, size_t count) {
  const size_t i = 4 * (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i + 4 <= count) {
    const auto x = *reinterpret_cast<const Pack<float, 4>*>(from + i);
    Pack<bf16, 4> y;
    for (int j = 0; j < 4; ++j) y.at[j] = __float2bfloat16(x.at[j]);
    *reinterpret_cast<Pack<bf16, 4>*>(to + i) = y;
  } else {
    for (size_t j = i; j < count; ++j) to[j] = __float2bfloat16(from[j]);
  }
}

}  // namespace

cudaStream_t stream() {
  return context().stream;
}

int multiprocessors() {
  return context().multiprocessors;
}

const double* on_device(const double* host, int count) {
  if (count > 8) fail("more constants than there is room for");
  check(cudaMemcpyAsync(context().constants, host, static_cast<size_t>(count) * sizeof(double),
                        cudaMemcpyHostToDevice, stream()),
        "copying constants to the GPU");
  return context().constants;
}

const double* in_place(const double* host, int count) {
  cudaPointerAttributes memory{};
  check(cudaPointerGetAttributes(&memory, host), "cudaPointerGetAttributes");
  if (memory.type != cudaMemoryTypeHost) return on_device(host, count);
  return static_cast<const double*>(memory.devicePointer);
}

void fail(const std::string& message) {
  throw_error(message);
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fail(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

void fail_outside(const Tensor&) {
  fail("a tensor in the host's memory was given to a kernel of the GPU");
}

}  // namespace cuda

namespace gpu {

using cuda::check;

namespace {

/// Why there is no GPU to use; empty where there is one.
std::string find_problem() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (status == cudaErrorInsufficientDriver) {
    return driver == 0
               ? "no NVIDIA driver is installed"
               : "the NVIDIA driver supports CUDA " + version(driver) + " and this build needs " +
                     version(runtime) + "; update the driver or build with an older toolkit";
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    return "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)";
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device);
      error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, cuda::round_kernel) != cudaSuccess) {
    cudaGetLastError();
    const std::string arch = std::to_string(properties.major * 10 + properties.minor);
    return std::string(properties.name) + " has compute capability " + arch +
           ", for which this build has no code; build with -DENTRAIN_CUDA_ARCHITECTURES=" + arch;
  }
  return "";
}

const std::string& problem() {
  static const std::string found = find_problem();
  return found;
}

std::string gib(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

cudaEvent_t event(void* e) {
  return static_cast<cudaEvent_t>(e);
}

}  // namespace

bool available() {
  return problem().empty();
}

std::string why_unavailable() {
  return problem();
}

Info info() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  Info info{.name = properties.name,
            .major = properties.major,
            .minor = properties.minor,
            .multiprocessors = properties.multiProcessorCount};
  check(cudaDriverGetVersion(&info.driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&info.runtime), "cudaRuntimeGetVersion");
  check(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), "cudaMemGetInfo");
  return info;
}

int count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void use(int index) {
  check(cudaSetDevice(index), "cudaSetDevice");
}

Uuid uuid(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  Uuid uuid;
  std::copy_n(reinterpret_cast<const uint8_t*>(properties.uuid.bytes), uuid.size(), uuid.begin());
  return uuid;
}

void* allocate(size_t bytes) {
  cuda::stream();  // the context's memory is not the asker's
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    cuda::throw_out_of_memory("out of memory: " + gib(bytes) +
                              " of the GPU were asked for at once, " + gib(info().free_bytes) +
                              " of " + gib(info().total_bytes) + " are free");
  }
  check(status, "cudaMalloc");
  zero(memory, bytes);
  return memory;
}

void release(void* memory) noexcept {
  cudaFree(memory);
}

void* allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
  return memory;
}

void release_pinned(void* memory) noexcept {
  cudaFreeHost(memory);
}

void to_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda::stream()),
        "copy to the GPU");
}

void to_host(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda::stream()),
        "copy from the GPU");
}

void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda::stream()),
        "copy on the GPU");
}

void zero(void* memory, size_t bytes) {
  check(cudaMemsetAsync(memory, 0, bytes, cuda::stream()), "cudaMemset");
}

void round_to_bf16(void* to, const void* from, size_t count) {
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>((count + 1023) / 1024);
  cuda::round_kernel<<<blocks, 256, 0, cuda::stream()>>>(static_cast<const float*>(from),
                                                         static_cast<cuda::bf16*>(to), count);
  cuda::check_launch("round_to_bf16");
}

void synchronize() {
  check(cudaStreamSynchronize(cuda::stream()), "the GPU's work failed");
}

Event::Event() : event_(nullptr, [](void* e) { cudaEventDestroy(event(e)); }) {
  cudaEvent_t created;
  check(cudaEventCreate(&created), "cudaEventCreate");
  event_.reset(created);
}

void Event::record() {
  // External: the event itself is recorded each time the graph runs, instead of an edge within it.
  const unsigned flags = cuda::capturing() ? cudaEventRecordExternal : cudaEventRecordDefault;
  check(cudaEventRecordWithFlags(event(event_.get()), cuda::stream(), flags), "cudaEventRecord");
}

void Event::wait() const {
  check(cudaEventSynchronize(event(event_.get())), "the GPU's work failed");
}

double Event::seconds_since(const Event& begin) const {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, event(begin.event_.get()), event(event_.get())),
        "cudaEventElapsedTime");
  return 1e-3 * static_cast<double>(milliseconds);
}

void Graph::capture(const std::function<void()>& f) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(cuda::stream(), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  try {
    f();
  } catch (...) {
    cudaStreamEndCapture(cuda::stream(), &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(cuda::stream(), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  graph_ = Handle(executable,
                  [](void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); });
}

void Graph::launch() const {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_.get()), cuda::stream()),
        "cudaGraphLaunch");
}

}  // namespace gpu
}  // namespace entrain
