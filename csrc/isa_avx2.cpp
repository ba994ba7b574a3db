// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_AVX2
#define HAL_TABLE_NAME avx2
#include "table.inl"
