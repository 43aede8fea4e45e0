# cuDNN 9: CUDNN_FOUND, CUDNN_VERSION and the target CUDNN::cudnn. Looked for where CUDA is and where
# the system's packages are; CUDNN_ROOT names another folder, such as nvidia/cudnn of the Python
# package nvidia-cudnn-cu13, which has no libcudnn.so without its version.
find_path(CUDNN_INCLUDE_DIR cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_library(CUDNN_LIBRARY NAMES cudnn libcudnn.so.9 HINTS ${CUDAToolkit_LIBRARY_DIR})
mark_as_advanced(CUDNN_INCLUDE_DIR CUDNN_LIBRARY)

if(EXISTS "${CUDNN_INCLUDE_DIR}/cudnn_version.h")
  file(READ "${CUDNN_INCLUDE_DIR}/cudnn_version.h" CUDNN_VERSION_HEADER)
  foreach(part MAJOR MINOR PATCHLEVEL)
    string(REGEX MATCH "#define CUDNN_${part} ([0-9]+)" _ "${CUDNN_VERSION_HEADER}")
    set(CUDNN_${part} ${CMAKE_MATCH_1})
  endforeach()
  set(CUDNN_VERSION ${CUDNN_MAJOR}.${CUDNN_MINOR}.${CUDNN_PATCHLEVEL})
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CUDNN
  REQUIRED_VARS CUDNN_LIBRARY CUDNN_INCLUDE_DIR
  VERSION_VAR CUDNN_VERSION)

if(CUDNN_FOUND AND NOT TARGET CUDNN::cudnn)
  add_library(CUDNN::cudnn UNKNOWN IMPORTED)
  set_target_properties(CUDNN::cudnn PROPERTIES
    IMPORTED_LOCATION "${CUDNN_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${CUDNN_INCLUDE_DIR}")
endif()
