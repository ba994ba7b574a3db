# SPDX-License-Identifier: Apache-2.0
# One object library per instruction set. Sets HAL_FLAGS and HAL_ISA_OBJECTS.

# -ffp-contract=off: a fused multiply-add in codec code would change bits. -O3 stays whatever the
# build type says: the packed kernels are useless at -O0.
set(HAL_FLAGS -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wshadow)
if(HAL_STRICT)
  list(APPEND HAL_FLAGS -Werror)
endif()
# -Wno-psabi: vectors are passed between inlined functions only. -Wno-maybe-uninitialized: GCC 12
# warns inside its own AVX-512 headers (_mm512_undefined_epi32).
set(HAL_ISA_FLAGS ${HAL_FLAGS} -Wno-psabi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND HAL_ISA_FLAGS -Wno-maybe-uninitialized)
endif()

set(HAL_ISA_OBJECTS)
function(hal_isa name)
  add_library(hal_isa_${name} OBJECT csrc/isa_${name}.cpp)
  target_compile_options(hal_isa_${name} PRIVATE ${HAL_ISA_FLAGS} ${ARGN})
  set(HAL_ISA_OBJECTS ${HAL_ISA_OBJECTS} hal_isa_${name} PARENT_SCOPE)
endfunction()

set(avx2 -mavx2 -mfma -mf16c -mbmi2)
set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(avx512vnni ${avx512} -mavx512vbmi -mavx512vnni -mavx512bf16)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  hal_isa(scalar)
  hal_isa(avx2 ${avx2})
  hal_isa(avxvnni ${avx2} -mavxvnni)
  hal_isa(avx512 ${avx512})
  hal_isa(avx512vnni ${avx512vnni})
  hal_isa(amx ${avx512vnni} -mamx-tile -mamx-int8 -mamx-bf16 -mavx512fp16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  hal_isa(neon)
  hal_isa(neon_dot -march=armv8.2-a+dotprod)
  hal_isa(neon_i8mm -march=armv8.2-a+dotprod+i8mm)
else()
  hal_isa(scalar)
endif()
