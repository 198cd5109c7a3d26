# A libnsa_cuda.so that was built elsewhere, e.g. on a machine with more cores or another Python: only the Python module is built.
find_library(NSA_PREBUILT_LIBRARY nsa_cuda PATHS ${NSA_PREBUILT} NO_DEFAULT_PATH NO_CACHE)
if(NOT NSA_PREBUILT_LIBRARY)
  message(FATAL_ERROR "NSA_PREBUILT is ${NSA_PREBUILT}; it holds no libnsa_cuda.so")
endif()
execute_process(COMMAND ${CMAKE_READELF} -d ${NSA_PREBUILT_LIBRARY} OUTPUT_VARIABLE nsa_dynamic_section ERROR_QUIET)
if(nsa_dynamic_section AND NOT nsa_dynamic_section MATCHES "SONAME[^\n]*\\[libnsa_cuda\\.so\\]")
  message(FATAL_ERROR "${NSA_PREBUILT_LIBRARY} goes by another name at run time; build it with -DNSA_FOR_WHEEL=ON")
endif()
message(STATUS "nsa_cuda ${PROJECT_VERSION}: using ${NSA_PREBUILT_LIBRARY}")
add_library(nsa_cuda SHARED IMPORTED)
set_target_properties(nsa_cuda PROPERTIES
  IMPORTED_LOCATION ${NSA_PREBUILT_LIBRARY}
  INTERFACE_INCLUDE_DIRECTORIES ${PROJECT_SOURCE_DIR}/csrc/include)
