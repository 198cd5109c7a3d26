# libnsa_cuda.so: public API, host checks, CPU backend and, where wanted, the CUDA kernels.
include(cmake/cuda.cmake)
find_package(OpenMP REQUIRED COMPONENTS CXX)

if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/cpu/sources.cmake)
  include(csrc/cpu/sources.cmake)  # NSA_CPU_SOURCES and their flags
else()
  file(GLOB NSA_CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp)
endif()

add_library(nsa_cuda SHARED
  csrc/host/api.cpp
  csrc/host/problem.cpp
  csrc/host/build_info.cpp
  csrc/host/gated_sum.cpp
  csrc/host/status.cpp
  csrc/host/tensor_view.cpp
  csrc/host/validate_problem.cpp
  csrc/host/validate_range.cpp
  csrc/host/validate_tensors.cpp
  ${NSA_CPU_SOURCES})
add_library(nsa_cuda::nsa_cuda ALIAS nsa_cuda)
target_include_directories(nsa_cuda
  PRIVATE csrc
  PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(nsa_cuda PUBLIC cxx_std_17)
target_compile_options(nsa_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers>)
# OpenMP's runtime is linked by its plain name. Where torch ships the same name (libgomp.so.1) and is loaded first, the process
# has one runtime; otherwise two live side by side, each with its own threads, and every call says how many it wants.
target_link_libraries(nsa_cuda PRIVATE OpenMP::OpenMP_CXX)

if(NSA_CUDA_ENABLED)
  include(cmake/instances.cmake)
  nsa_add_cuda_kernels(nsa_cuda)
endif()

# What the build-info functions of nsa.h report.
set(nsa_toolkit "")
set(nsa_architectures "")
if(NSA_CUDA_ENABLED)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" nsa_toolkit "${CMAKE_CUDA_COMPILER_VERSION}")
  set(nsa_architectures "${CMAKE_CUDA_ARCHITECTURES}")
  if(TARGET nsa_sm90)
    list(APPEND nsa_architectures 90a-real)
    list(REMOVE_DUPLICATES nsa_architectures)
  endif()
endif()
file(CONFIGURE OUTPUT generated/build_values.h @ONLY CONTENT [[
#pragma once
#define NSA_VERSION "@PROJECT_VERSION@"
#define NSA_CUDA_ARCHITECTURES "@nsa_architectures@"
#define NSA_CUDA_TOOLKIT "@nsa_toolkit@"
]])
target_include_directories(nsa_cuda PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)

if(NOT NSA_FOR_WHEEL)
  # Before 1.0 a minor version may change the structs. A wheel has no place for the links that SOVERSION needs.
  set_target_properties(nsa_cuda PROPERTIES
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()
