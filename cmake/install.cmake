# The same tree for `cmake --install` and inside the wheel (prefix site-packages/nsa_cuda):
#   lib/libnsa_cuda.so  lib/cmake/nsa_cuda/*.cmake  include/nsa_cuda/nsa.h, and the Python module at the wheel's root.
include(CMakePackageConfigHelpers)

if(NSA_BUILD_PYTHON)
  install(TARGETS _C DESTINATION .)
endif()
set(nsa_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/nsa_cuda)
if(NSA_PREBUILT)
  install(FILES ${NSA_PREBUILT_LIBRARY} DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME libnsa_cuda.so)
  install(FILES cmake/prebuilt-targets.cmake DESTINATION ${nsa_config_dir} RENAME nsa_cuda-targets.cmake)
else()
  install(TARGETS nsa_cuda EXPORT nsa_cuda-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT nsa_cuda-targets NAMESPACE nsa_cuda:: DESTINATION ${nsa_config_dir})
endif()
install(FILES csrc/include/nsa_cuda/nsa.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/nsa_cuda)
configure_package_config_file(cmake/nsa_cuda-config.cmake.in nsa_cuda-config.cmake INSTALL_DESTINATION ${nsa_config_dir})
write_basic_package_version_file(nsa_cuda-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/nsa_cuda-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/nsa_cuda-config-version.cmake
  DESTINATION ${nsa_config_dir})
