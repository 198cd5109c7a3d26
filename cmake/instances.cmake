# Turns csrc/instances.cmake, the list of compiled kernels, into one .cu per kernel and one dispatch row per kernel.

# nsa_instance(<family> <operation> <dtype> <Dk> <Dv>)
function(nsa_instance family operation dtype head_dim_qk head_dim_v)
  set(name ${family}_${operation}_${dtype}_${head_dim_qk}_${head_dim_v})
  if(family STREQUAL "sm90" AND NOT NSA_SM90)
    return()
  endif()
  if(NSA_INSTANCES_SUBSET AND NOT name MATCHES "${NSA_INSTANCES_SUBSET}")
    return()
  endif()
  set(arguments "${dtype}, ${head_dim_qk}, ${head_dim_v}")
  # file(CONFIGURE) leaves an unchanged file alone, so that configuring again compiles nothing again.
  string(CONCAT content "#include \"${family}/${operation}/launch.cuh\"\n" "NSA_INSTANCE(${name}, ${arguments})\n")
  file(CONFIGURE OUTPUT instances/${name}.cu CONTENT "${content}" @ONLY)
  set_property(GLOBAL APPEND PROPERTY NSA_INSTANCE_SOURCES_${family} ${CMAKE_CURRENT_BINARY_DIR}/instances/${name}.cu)
  set_property(GLOBAL APPEND_STRING PROPERTY NSA_INSTANCE_ROWS "NSA_ROW(${family}, ${operation}, ${arguments})\n")
endfunction()

function(nsa_cuda_flags target)
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 --expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall>)
endfunction()

# The kernels of one family: an object library, since its architectures are its own, and since the spill gate is for these files
# alone (CUB's own kernels may use local memory).
function(nsa_add_family target family architectures)
  get_property(sources GLOBAL PROPERTY NSA_INSTANCE_SOURCES_${family})
  if(NOT sources)
    return()
  endif()
  list(LENGTH sources count)
  message(STATUS "nsa_cuda: ${count} ${family} kernels for ${architectures}")
  add_library(nsa_${family} OBJECT ${sources})
  target_include_directories(nsa_${family} PRIVATE csrc csrc/include)
  nsa_cuda_flags(nsa_${family})
  set_target_properties(nsa_${family} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  set(gate --warn-on-spills,--warn-on-local-memory-usage)
  if(NSA_SPILL_GATE)
    string(PREPEND gate --warning-as-error,)
  endif()
  target_compile_options(nsa_${family} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=${gate}>)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:nsa_${family}>)
endfunction()

function(nsa_add_cuda_kernels target)
  include(${PROJECT_SOURCE_DIR}/csrc/instances.cmake)
  get_property(rows GLOBAL PROPERTY NSA_INSTANCE_ROWS)
  if(NOT rows)
    message(FATAL_ERROR "NSA_INSTANCES_SUBSET is ${NSA_INSTANCES_SUBSET}; it matches no kernel of csrc/instances.cmake")
  endif()
  file(CONFIGURE OUTPUT instances/instances.inc CONTENT "${rows}" @ONLY)
  nsa_add_family(${target} sm80 "${CMAKE_CUDA_ARCHITECTURES}")
  nsa_add_family(${target} sm90 90a-real)

  file(GLOB common CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/common/*.cu ${PROJECT_SOURCE_DIR}/csrc/common/*.cpp)
  target_sources(${target} PRIVATE ${common})
  nsa_cuda_flags(${target})
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/instances
    ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${target} PRIVATE NSA_WITH_CUDA)
  # Symbols of the static CUDA runtime stay inside.
  target_link_options(${target} PRIVATE LINKER:--exclude-libs,ALL)
endfunction()
