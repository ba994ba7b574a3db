// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_SCALAR
#define HAL_TABLE_NAME scalar
#include "table.inl"
