// SPDX-License-Identifier: Apache-2.0
// What the machine can do at best, measured beside kernels by benchmarks: reading memory, and
// multiplying registers in the way products of this instruction set do.
#pragma once
#include "vec.h"

namespace {

const int64_t READ_UNIT = 1 << 14;

typedef uint64_t u64x8 __attribute__((vector_size(64)));

static void read_units(const HalProbe* a, int64_t unit, int64_t end) {
  u64x8 sum[4] = {};
  for (const uint8_t* p = a->data + unit * READ_UNIT; p < a->data + end * READ_UNIT; p += 256) {
    for (int i = 0; i < 4; i++) {
      u64x8 x;
      __builtin_memcpy(&x, p + 64 * i, 64);
      __builtin_prefetch(p + 64 * i + 4096);
      sum[i] ^= x;
    }
  }
  sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
  __asm__ volatile("" : : "r"(sum[0][0] ^ sum[0][7]));
}

// A unit is 1024 rounds; PEAK_OPS multiplications and additions in all.
#if HAL_LEVEL == HAL_LEVEL_AMX

const int64_t PEAK_OPS = 1024LL * 4 * 16 * 16 * 32 * 2;

static void peak_units(const HalProbe*, int64_t unit, int64_t end) {
  alignas(64) static const uint16_t zeros[512] = {};
  _tile_loadconfig(&TILE_CONFIG);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = unit * 1024; i < end * 1024; i++) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
}

#else

const int CHAINS = 12;
#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI
const int64_t PEAK_OPS = 1024LL * CHAINS * 64;
#else
const int64_t PEAK_OPS = 1024LL * CHAINS * 32;
#endif

static void peak_units(const HalProbe*, int64_t unit, int64_t end) {
  vf acc[CHAINS];
  const vf x = set1(1);
  float start[CHAINS + 16];  // equal chains would be merged
  for (int c = 0; c < CHAINS + 16; c++) start[c] = (float)c;
  for (int c = 0; c < CHAINS; c++) acc[c] = load<HAL_F32>(start + c);
  for (int64_t i = unit * 1024; i < end * 1024; i++) {
#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) {
      acc[c] = _mm512_dpbf16_ps(acc[c], (__m512bh)_mm512_castps_si512(x),
                                (__m512bh)_mm512_castps_si512(x));
    }
#else
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) acc[c] = fma(acc[c], x, x);
#endif
  }
  for (int c = 1; c < CHAINS; c++) acc[0] = add(acc[0], acc[c]);
  const float sum = first(acc[0]);
  __asm__ volatile("" : : "r"(bits_as<uint32_t>(sum)));
}

#endif

}  // namespace
