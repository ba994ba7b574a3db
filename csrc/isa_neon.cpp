// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_SCALAR  // the portable vectors, which the compiler turns into NEON
#define HAL_TABLE_NAME neon
#include "table.inl"
