// SPDX-License-Identifier: Apache-2.0
// The native contract: one POD per verb and one table of functions per instruction set. Addresses
// and sizes only, so that no tensor type and no C++ runtime type crosses the border.
//
// Every function works on a range of units (groups, rows, 32-column blocks or 64-column tiles; see
// each entry) and keeps no state, so the caller alone decides about threads.
#pragma once
#include <stdint.h>

enum HalFloat { HAL_F32 = 0, HAL_BF16 = 1, HAL_F16 = 2 };
// The group-wise verbs.
enum HalVerb {
  HAL_SEARCH, HAL_QDQ, HAL_QDQ_STEP, HAL_QUANTIZE, HAL_DEQUANTIZE, HAL_QUANTIZE_ACT, HAL_ROUND
};
enum HalLayout { HAL_GPTQ = 0, HAL_AWQ = 1, HAL_STREAM = 2 };
// How to multiply: codes as they are; with activations as s8 codes per group of the weight; with the
// weight rounded to bf16, scales and all.
enum HalWay { HAL_EXACT = 0, HAL_FAST = 1, HAL_ROUNDED = 2 };

// An encoded [n, k] matrix: hal.Spec as numbers. `width`: columns of a full group; `least`: the
// smallest |scale|, already rounded to the scale's storage dtype.
struct HalShape {
  int64_t n, k, width, groups;
  int32_t bits, symmetric, dtype, scale_dtype;
  float least;
};

// hal.Params; v may be null.
struct HalParams {
  float *v, *lo, *hi, *amin, *amax;
};

struct HalSearch {
  HalShape s;
  const void* w;
  const float* importance;  // [k] or null
  const float* factors;     // candidates of the range; none = min-max
  int64_t n_factors;
  float *amin, *amax;
};

struct HalQdq {
  HalShape s;
  const void* w;
  HalParams p;
  void* out;
};

struct HalStep {
  HalShape s;
  const void* w;
  const void* grad;
  int32_t grad_dtype;
  HalParams p;
  float lr_v, lr_range;
};

// Plain parts. quantize writes them, dequantize reads them; zero is null for symmetric codes.
struct HalPlain {
  HalShape s;
  uint8_t* codes;
  void* scale;
  uint8_t* zero;
  HalParams p;    // quantize
  const void* w;  // quantize
  void* out;      // dequantize, s.dtype
};

// Activations [n, k] to s8 codes and f32 scales [n, groups]: computed, or given.
struct HalAct {
  HalShape s;
  const void* x;
  int8_t* codes;
  float* scale;
  int32_t given;
};

// [n, k] rounded to nearest within the range of each group: codes as HAL_STREAM.
struct HalRound {
  HalShape s;
  const void* w;
  uint8_t* words;
  void* scale;
  uint8_t* zero;
};

// codes u8 [n, k] <-> qweight i32 of a file layout.
struct HalRepack {
  HalShape s;
  int32_t layout;
  uint8_t* codes;
  uint32_t* words;
};

// A weight in the tile layout (csrc/README.md): 64 columns of the output per tile. Every group is
// padded to a multiple of 8 inputs, `kp` inputs in all.
struct HalTiles {
  HalShape s;
  int64_t kp, tiles;
  uint8_t* codes;
  void* scale;    // [tiles, groups, 64], storage dtype
  uint8_t* zero;  // [tiles, groups, 64] or null
};

// x [m, k] times rows `first .. first + n` of the tiles. `x` was prepared by prepare_x.
struct HalGemm {
  HalTiles w;
  int64_t m, first, n;
  const void* x;     // raw activations, dtype s.dtype
  void* prepared;    // prepared_bytes, 64-byte aligned, in the form gemm reads
  const void* bias;  // [n] or null
  int32_t bias_dtype;
  void* out;  // [m, ldo], dtype s.dtype
  int64_t ldo;
  int32_t way;  // HAL_ROUNDED: x bf16, on AMX
};

// Rows x [., k] += more (where given), then their root mean square norm, times weight [k].
struct HalNorm {
  int64_t k;
  int32_t dtype;
  float eps;
  void* x;
  const void* more;
  const void* weight;
  void* out;
};

// silu(gate) * up of rows [gate | up], n columns each.
struct HalGate {
  int64_t n;
  int32_t dtype;
  const void* x;
  void* out;
};

// Attention of m new rows, at positions at .. at + m, to themselves and all before them. Their keys
// and values enter the cache first. length is a multiple of 32, dim of 32 and at most 256.
struct HalAttend {
  int64_t m, heads, kv_heads, dim, at, length;
  int32_t dtype;
  float eps, scale;
  const void* qkv;              // [m, heads + 2 kv_heads, dim]
  const void *q_norm, *k_norm;  // [dim] or null
  const void *cos, *sin;        // [length, dim]
  void* keys;                   // [kv_heads, length / 32, dim, 32]
  void* values;                 // [kv_heads, length, dim]
  void* out;                    // [m, heads, dim]
  float* scores;                // scratch [kv_heads, 4, length]
};

// Adds what bytes come to into 2048 sums (digest.h); finite: whether they are numbers of `dtype` (HalFloat,
// else -1) that all are.
struct HalDigest {
  const uint8_t* data;
  int64_t bytes;
  int32_t dtype;
  uint64_t* sums;
  bool* finite;
};

// Memory for the read probe: units of 16 KB.
struct HalProbe {
  const uint8_t* data;
};

struct HalTable {
  const char* name;
  void (*search)(const HalSearch*, int64_t group, int64_t end);
  void (*qdq)(const HalQdq*, int64_t group, int64_t end);
  void (*qdq_step)(const HalStep*, int64_t group, int64_t end);
  void (*quantize)(const HalPlain*, int64_t group, int64_t end);
  void (*dequantize)(const HalPlain*, int64_t group, int64_t end);
  void (*quantize_act)(const HalAct*, int64_t group, int64_t end);
  void (*round)(const HalRound*, int64_t group, int64_t end);
  void (*pack)(const HalRepack*, int64_t block, int64_t end);    // blocks of 32 columns
  void (*unpack)(const HalRepack*, int64_t block, int64_t end);  // blocks of 32 columns
  void (*tile)(const HalTiles*, const HalPlain*, int64_t tile, int64_t end);
  void (*untile)(const HalTiles*, const HalPlain*, int64_t tile, int64_t end);
  int64_t (*prepared_bytes)(const HalGemm*);
  void (*prepare_x)(const HalGemm*, int64_t row, int64_t end);
  void (*gemm)(const HalGemm*, int64_t tile, int64_t end);  // tiles that overlap first .. first + n
  void (*norm)(const HalNorm*, int64_t row, int64_t end);
  void (*gate)(const HalGate*, int64_t row, int64_t end);
  void (*attend)(const HalAttend*, int64_t kv_head, int64_t end);
  void (*digest)(const HalDigest*);
  void (*read)(const HalProbe*, int64_t unit, int64_t end);
  void (*peak)(const HalProbe*, int64_t unit, int64_t end);
  int64_t peak_ops;  // of one unit
};

// One per object compiled for an instruction set.
extern const HalTable hal_table_scalar, hal_table_avx2, hal_table_avxvnni, hal_table_avx512,
    hal_table_avx512vnni, hal_table_amx, hal_table_neon, hal_table_neon_dot, hal_table_neon_i8mm;
