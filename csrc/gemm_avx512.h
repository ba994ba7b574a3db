// SPDX-License-Identifier: Apache-2.0
// AVX-512: which product serves which case; 4-bit codes decoded by register tables for up to four
// rows of x.
#pragma once

namespace {

// Rows served without storing the decoded tile.
const int FEW = 4;

// Calls body with `rows` = 1 .. FEW as a compile-time constant.
template <class Body>
HAL_INLINE void few_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: body(Rows<1>()); break;
    case 2: body(Rows<2>()); break;
    case 3: body(Rows<3>()); break;
    default: body(Rows<4>());
  }
}

#if HAL_LEVEL == HAL_LEVEL_AVX512

// Nibble t of a lane is input t / 2 + t % 2 * 4; vpermps looks at the low four bits of a lane only,
// so a shift and a table give code - zero without masks.
template <int R>
HAL_INLINE void nibbles_f32(const HalTiles& w, const float* x, int64_t tile, float* sums) {
  const float center = w.zero ? 0.0f : 8.0f;
  const vf table = _mm512_sub_ps(
      _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
      set1(center));
  const uint8_t* in = tile_codes(w, tile, 0);
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g));
    const float* xg = x + group_start(w.s, g);
    vf acc[R][4], zero[4];
    for (int v = 0; v < 4; v++) {
      zero[v] = w.zero ? zero_of(w, tile, g, v) : set1(0);
      for (int r = 0; r < R; r++) acc[r][v] = set1(0);
    }
    for (int64_t k = 0; k < inputs; k += 8, in += 256) {
      prefetch_step<4>(in);
      for (int v = 0; v < 4; v++) {
        const __m512i codes = _mm512_loadu_si512(in + 64 * v);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
          vf q = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * t), table);
          if (w.zero) q = sub(q, zero[v]);
          for (int r = 0; r < R; r++) {
            acc[r][v] = fma(q, set1(xg[r * w.kp + k + t / 2 + t % 2 * 4]), acc[r][v]);
          }
        }
      }
    }
    for (int v = 0; v < 4; v++) {
      const vf scale = scale_of(w, tile, g, v);
      for (int r = 0; r < R; r++) {
        float* c = sums + r * TILE + 16 * v;
        store<HAL_F32>(c, fma(scale, acc[r][v], load<HAL_F32>(c)));
      }
    }
  }
}

static void few_f32(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const float* x = (const float*)a.prepared + row * a.w.kp;
  few_rows(rows, [&](auto r) __attribute__((always_inline)) {
    nibbles_f32<decltype(r)::value>(a.w, x, tile, sums);
  });
}

#endif

#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI

// Groups are multiplied in chunks: 128 inputs of a tile are 8 KB as bytes and 16 KB as bf16, and sums
// of 128 products of codes and digits stay below 2^22, exact in f32 too.
const int64_t X_CHUNK = 128;

HAL_INLINE int64_t chunks_of(int64_t inputs) { return (inputs + X_CHUNK - 1) / X_CHUNK; }

HAL_INLINE int64_t row_chunks(const HalTiles& w) {
  return (w.s.groups - 1) * chunks_of(w.s.width) + chunks_of(group_inputs(w.s, w.s.groups - 1));
}

// One chunk: of group g, from input i of it, n inputs with the padding, the index-th of a row.
struct Chunk {
  int64_t g, i, n, index;
};

HAL_INLINE Chunk first_chunk(const HalTiles& w, int64_t g) {
  const int64_t inputs = g < w.s.groups ? padded(group_inputs(w.s, g)) : 0;
  return {g, 0, inputs < X_CHUNK ? inputs : X_CHUNK, g * chunks_of(w.s.width)};
}

HAL_INLINE Chunk next_chunk(const HalTiles& w, const Chunk& c) {
  const int64_t left = padded(group_inputs(w.s, c.g)) - c.i - c.n;
  if (left == 0) return first_chunk(w, c.g + 1);
  return {c.g, c.i + c.n, left < X_CHUNK ? left : X_CHUNK, c.index + 1};
}

// Scales and zero points of one group of a tile.
struct Columns {
  vf scale[4], zero[4];
};

// Two lines in every few kilobytes of codes are no stream that hardware would follow: those of four groups
// on are fetched here. 2 bits from memory were read at .88 of the probe without, at .96 with it.
HAL_INLINE Columns columns_of(const HalTiles& w, int64_t tile, int64_t g) {
  Columns c;
  const int64_t later = (tile * w.s.groups + g + 4) * TILE, size = w.s.scale_dtype == HAL_F32 ? 4 : 2;
  for (int64_t i = 0; i < TILE * size; i += 64) __builtin_prefetch((const char*)w.scale + later * size + i);
  if (w.zero) __builtin_prefetch(w.zero + later);
  for (int v = 0; v < 4; v++) {
    c.scale[v] = scale_of(w, tile, g, v);
    c.zero[v] = w.zero ? zero_of(w, tile, g, v) : set1(0);
  }
  return c;
}

#endif

}  // namespace

#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
#include "gemm_bf16.h"
#include "gemm_s8.h"
#endif
#if HAL_LEVEL == HAL_LEVEL_AMX
#include "gemm_amx.h"
#include "gemm_panel.h"
#include "gemm_panel_s8.h"
#endif

namespace {

static Path path_of(const HalGemm& a) {
#if HAL_LEVEL == HAL_LEVEL_AMX
  if (a.way == HAL_ROUNDED) return panel_path(a);
  // Up to three digits the vector units keep up with the memory (0.29 ms of 4096 x 4096 in 4 bits, where
  // tiles take 0.31, groups of 32 0.32 and 0.53); few rows of digits cost less unpacking than bf16.
  if (a.m == 1 || a.m * digits_of(a) <= 3) return digits_path<VectorProduct, RowDigits>(a);
  if (a.way == HAL_FAST && a.m > M_BLOCK && fits_panel_s8(a.w)) return panel_s8_path(a);
  if (a.way == HAL_FAST || a.m <= (a.w.s.bits > 5 ? 10 : 5)) return digits_amx(a);
  return bf16_amx(a);
#elif HAL_LEVEL == HAL_LEVEL_AVX512VNNI
  if (a.way == HAL_FAST || a.m <= FEW) return digits_path<VectorProduct, RowDigits>(a);
#else
  if (a.m <= FEW && a.w.s.bits == 4) return {few_f32, prepare_f32, size_f32};
#endif
#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI
  if (a.w.s.dtype == HAL_BF16) {
    return {block_bf16, prepare_bf16<RowX>, size_bf16<RowX>};
  }
#endif
  return {block_f32, prepare_f32, size_f32};
}

}  // namespace
