// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_SCALAR  // and the extension, which gemm_dot.h looks for
#define HAL_TABLE_NAME neon_i8mm
#include "table.inl"
