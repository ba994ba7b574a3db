// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_AVX2  // and AVX-VNNI, which gemm_dot.h looks for
#define HAL_TABLE_NAME avxvnni
#include "table.inl"
