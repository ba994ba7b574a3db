// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_AVX512
#define HAL_TABLE_NAME avx512
#include "table.inl"
