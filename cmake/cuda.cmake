# What a build with CUDA adds: the compiler, cuBLASLt, NCCL, and cuDNN where it is found. Sets
# GPU_SOURCES and GPU_LIBRARIES.
find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin REQUIRED)
list(TRANSFORM ENTRAIN_CUDA_ARCHITECTURES APPEND -real OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake 3.25 does not know that nvcc has it
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
find_package(CUDAToolkit 12.3 REQUIRED)
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_library(NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${CUDAToolkit_LIBRARY_DIR})
mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
if(NOT NCCL_INCLUDE_DIR OR NOT NCCL_LIBRARY)
  message(FATAL_ERROR "NCCL was not found, which GPUs exchange gradients by: install libnccl-dev, or "
                      "name its folders with -DNCCL_INCLUDE_DIR=... -DNCCL_LIBRARY=.../libnccl.so.2")
endif()
add_library(NCCL::nccl UNKNOWN IMPORTED)
set_target_properties(NCCL::nccl PROPERTIES
  IMPORTED_LOCATION "${NCCL_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${NCCL_INCLUDE_DIR}")
set(GPU_LIBRARIES CUDA::cudart CUDA::cublasLt NCCL::nccl)

file(GLOB GPU_SOURCES CONFIGURE_DEPENDS kernels/cuda/*.cu kernels/cuda/*.cpp)
list(APPEND CMAKE_MODULE_PATH ${PROJECT_SOURCE_DIR}/cmake)
find_package(CUDNN 9.10)
if(CUDNN_FOUND)
  list(FILTER GPU_SOURCES EXCLUDE REGEX "/no_cudnn.cpp$")
  list(APPEND GPU_LIBRARIES CUDNN::cudnn)
else()
  message(STATUS "cuDNN 9.10 or later was not found: full attention runs on our own kernels")
  list(FILTER GPU_SOURCES EXCLUDE REGEX "/dense_attention.cpp$")
endif()
