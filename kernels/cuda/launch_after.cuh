#pragma once
// Kernels that begin before the one before them in the stream has ended (programmatic dependent
// launch, Hopper): starting a grid, some 2 us, and what it does before it needs anybody's results
// go unnoticed. In a captured graph the edges between such kernels are of that kind too.
//
// A kernel that LaunchAfter starts begins once all blocks of the kernel before have called
// let_next_begin(), or ended. Every thread calls wait_for_previous() before it touches what the
// kernel before writes or reads, and let_next_begin() not earlier. So at any time only two kernels
// overlap, and what all others wrote is there from the first instruction on. Kernels that are
// started as usual wait for all before them.
#include "kernels/cuda/hopper.cuh"

namespace entrain::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void wait_for_previous() {
#ifdef ENTRAIN_HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#ifdef ENTRAIN_HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// How to start such a kernel. Its blocks form clusters, of which the grid is a multiple; on other
/// GPUs there are none of them, and it starts as usual.
class LaunchAfter {
 public:
  LaunchAfter(dim3 grid, int threads, size_t shared, dim3 cluster = {1, 1, 1}) {
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {cluster.x, cluster.y, cluster.z};
    config_.gridDim = grid;
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = shared;
    config_.stream = stream();
    config_.attrs = attributes_;
    config_.numAttrs = on_hopper() ? 2 : 0;
  }
  LaunchAfter(const LaunchAfter&) = delete;  // config_ points into it
  LaunchAfter& operator=(const LaunchAfter&) = delete;

  /// Clusters that the GPU, a Hopper, runs at a time.
  template <class Kernel>
  int clusters_at_once(const char* name, Kernel kernel) const {
    prepare(name, kernel);
    cudaLaunchConfig_t config = config_;
    config.attrs = config_.attrs + 1;  // of the clusters alone
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
    return clusters;
  }
  template <class... P, class... A>
  void operator()(const char* name, void (*kernel)(P...), const A&... arguments) const {
    prepare(name, kernel);
    check(cudaLaunchKernelEx(&config_, kernel, arguments...), name);
  }

 private:
  template <class Kernel>
  void prepare(const char* name, Kernel kernel) const {
    const auto set = [&](cudaFuncAttribute attribute, size_t value) {
      check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(value)), name);
    };
    cudaFuncAttributes is{};
    check(cudaFuncGetAttributes(&is, kernel), name);
    if (static_cast<size_t>(is.maxDynamicSharedSizeBytes) < config_.dynamicSmemBytes) {
      set(cudaFuncAttributeMaxDynamicSharedMemorySize, config_.dynamicSmemBytes);
    }
    if (!on_hopper()) return;
    // Kernels can only be beside each other where they agree on what of the cache is memory.
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);  // 16 blocks
  }

  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

#endif  // __CUDACC__

}  // namespace entrain::cuda
