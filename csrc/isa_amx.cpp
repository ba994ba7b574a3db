// SPDX-License-Identifier: Apache-2.0
#define HAL_LEVEL HAL_LEVEL_AMX
#define HAL_TABLE_NAME amx
#include "table.inl"
