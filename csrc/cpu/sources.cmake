# NSA_CPU_SOURCES: the CPU backend. The kernels_*.cpp hold the same code for one instruction set each; kernels.cpp asks
# the processor which to call.
file(GLOB NSA_CPU_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)

# Fused multiply-add where the target has it: GCC's default, not clang's.
set(nsa_cpu_flags -O3 -ffp-contract=fast)
set(nsa_cpu_avx2_flags -mavx2 -mfma -mf16c)
set(nsa_cpu_avx512_flags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)

set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_portable.cpp PROPERTIES
  COMPILE_OPTIONS "${nsa_cpu_flags}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels.cpp PROPERTIES COMPILE_DEFINITIONS NSA_CPU_X86)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp PROPERTIES
    COMPILE_OPTIONS "${nsa_cpu_flags};${nsa_cpu_avx2_flags}")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "${nsa_cpu_flags};${nsa_cpu_avx2_flags};${nsa_cpu_avx512_flags}")
else()
  list(FILTER NSA_CPU_SOURCES EXCLUDE REGEX "/kernels_avx[0-9]+\\.cpp$")
endif()
