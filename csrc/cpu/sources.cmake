# NSA_CPU_SOURCES: the CPU backend. The kernels_*.cpp hold the same code for one instruction set each; kernels.cpp asks the
# processor. Anything that an inlined function of another header could share with the rest stays out of them.
file(GLOB NSA_CPU_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)

set(nsa_cpu_kernel_flags -O3 -ffp-contract=fast)  # GCC's own default, clang's is "on": fused multiply-add where the target has it
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_portable.cpp PROPERTIES
  COMPILE_OPTIONS "${nsa_cpu_kernel_flags}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(nsa_avx2_flags -mavx2 -mfma -mf16c)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels.cpp PROPERTIES COMPILE_DEFINITIONS NSA_CPU_X86)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp PROPERTIES
    COMPILE_OPTIONS "${nsa_cpu_kernel_flags};${nsa_avx2_flags}")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "${nsa_cpu_kernel_flags};${nsa_avx2_flags};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
else()
  list(FILTER NSA_CPU_SOURCES EXCLUDE REGEX "/kernels_avx[0-9]+\\.cpp$")
endif()
