# SPDX-License-Identifier: Apache-2.0
# hal._sycl: an ordinary C++ compiler builds the host's part; the SYCL runtime compiles the kernels for
# the device when they are first asked for. HAL_SYCL_ROOT: where include/sycl and lib/libsycl.so are,
# by default this Python's own prefix (pip install intel-sycl-rt).
if(NOT HAL_SYCL_ROOT)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sys; print(sys.prefix)"
    OUTPUT_VARIABLE HAL_SYCL_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
find_path(SYCL_INCLUDE sycl/sycl.hpp HINTS ${HAL_SYCL_ROOT}/include REQUIRED NO_CACHE)
find_library(SYCL_LIBRARY sycl HINTS ${HAL_SYCL_ROOT}/lib REQUIRED NO_CACHE)

set(HAL_SYCL_SOURCES
  csrc/hal_abi.h csrc/floats.h csrc/team.h csrc/group_ops.h csrc/round_ops.h
  kernels_sycl/device.hpp kernels_sycl/products.h kernels_sycl/weight.hpp kernels_sycl/groups.cpp
  kernels_sycl/products.cpp kernels_sycl/matrix.cpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${HAL_SYCL_SOURCES})
set(embedded "")
foreach(source ${HAL_SYCL_SOURCES})
  file(READ ${source} text)
  get_filename_component(name ${source} NAME)
  string(APPEND embedded "{\"${name}\", R\"KERNEL(${text})KERNEL\"},\n")
endforeach()
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/sycl/sources.inc "${embedded}")

pybind11_add_module(_sycl NO_EXTRAS kernels_sycl/bind.cpp)
target_include_directories(_sycl PRIVATE csrc ${CMAKE_CURRENT_BINARY_DIR}/sycl)
target_include_directories(_sycl SYSTEM PRIVATE ${SYCL_INCLUDE})
# GCC does not know DPC++'s attributes.
target_compile_definitions(_sycl PRIVATE SYCL_LANGUAGE_VERSION=202012L
  SYCL2020_DISABLE_DEPRECATION_WARNINGS __SYCL_DISABLE_DEPRECATION_WARNINGS)
target_compile_options(_sycl PRIVATE -Wall -Wextra -Wno-attributes)
target_link_libraries(_sycl PRIVATE ${SYCL_LIBRARY})
# The prefix of the Python it is installed in, where pip puts the runtime, and where it was found.
get_filename_component(SYCL_HOME ${SYCL_LIBRARY} DIRECTORY)
set_target_properties(_sycl PROPERTIES INSTALL_RPATH "$ORIGIN/../../..;${SYCL_HOME}"
  BUILD_WITH_INSTALL_RPATH ON)
install(TARGETS _sycl LIBRARY DESTINATION hal)
