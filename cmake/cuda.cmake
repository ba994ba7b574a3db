# SPDX-License-Identifier: Apache-2.0
# hal._cuda: machine code for every architecture since Ampere, PTX of the last one for those to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90a-real 100a-real 120a-real 120-virtual)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
pybind11_add_module(_cuda NO_EXTRAS kernels_cuda/bind.cpp kernels_cuda/groups.cu
  kernels_cuda/qgemm.cu)
# Bit-equal to hal/codec.py: no fused multiply-add but those that are written.
set_source_files_properties(kernels_cuda/groups.cu PROPERTIES COMPILE_OPTIONS -fmad=false)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
install(TARGETS _cuda LIBRARY DESTINATION hal)
