# nsa_cuda._C: pybind11, no torch.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 2.12 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  find_package(pybind11 2.12 CONFIG REQUIRED)
endif()

pybind11_add_module(_C MODULE csrc/binding/module.cpp csrc/binding/gated_sum.cpp
  csrc/binding/range_attention.cpp)
target_link_libraries(_C PRIVATE nsa_cuda)
set_target_properties(_C PROPERTIES
  BUILD_RPATH "\$ORIGIN"
  INSTALL_RPATH "\$ORIGIN/lib"
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
