// SPDX-License-Identifier: Apache-2.0
// Included last by each isa_*.cpp: HAL_LEVEL and HAL_TABLE_NAME are set.
#include "block_ops.h"
#include "digest.h"
#include "gemm.h"
#include "pack_ops.h"
#include "probe.h"
#include "round_ops.h"

#define HAL_JOIN(a, b) a##b
#define HAL_SYMBOL(name) HAL_JOIN(hal_table_, name)
#define HAL_TEXT(name) #name
#define HAL_NAME(name) HAL_TEXT(name)

extern const HalTable HAL_SYMBOL(HAL_TABLE_NAME) = {
    HAL_NAME(HAL_TABLE_NAME),
    search_groups,
    qdq_groups,
    step_groups,
    quantize_groups,
    dequantize_groups,
    quantize_act_groups,
    round_groups,
    pack_blocks,
    unpack_blocks,
    tile_tiles,
    untile_tiles,
    prepared_size,
    prepare_rows,
    gemm_tiles,
    norm_rows,
    gate_rows,
    attend_heads,
    digest_bytes,
    read_units,
    peak_units,
    PEAK_OPS,
};
