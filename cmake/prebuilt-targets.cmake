# Stands for the exported targets file in a package that holds a library built elsewhere.
get_filename_component(nsa_prefix ${CMAKE_CURRENT_LIST_DIR}/../../.. ABSOLUTE)
if(NOT TARGET nsa_cuda::nsa_cuda)
  add_library(nsa_cuda::nsa_cuda SHARED IMPORTED)
  set_target_properties(nsa_cuda::nsa_cuda PROPERTIES
    IMPORTED_LOCATION ${nsa_prefix}/lib/libnsa_cuda.so
    INTERFACE_INCLUDE_DIRECTORIES ${nsa_prefix}/include
    INTERFACE_COMPILE_FEATURES cxx_std_17)
endif()
