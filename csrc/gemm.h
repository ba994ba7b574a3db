// SPDX-License-Identifier: Apache-2.0
// x times a weight in tiles. Exact: codes become small integers (exact in f32 and in bf16), products
// are summed in f32 within a group, and the group's scale multiplies the sum.
//
// Large m: a chunk of a group is decoded once into L1 and multiplied by all rows (MR x 64
// accumulators). Few rows of 4-bit weights on AVX-512: decoded in registers, never stored.
#pragma once
#include "group_ops.h"
#include "pack_ops.h"

namespace {

// Rows of x held in accumulators at once, and vectors of 16 columns: 24 zmm, 12 ymm, 8 xmm.
#if HAL_LEVEL >= HAL_LEVEL_AVX512
const int MR = 6, NV = 4;
#elif HAL_LEVEL == HAL_LEVEL_AVX2
const int MR = 6, NV = 1;
#else
const int MR = 2, NV = 1;
#endif
const int64_t CHUNK = 64;   // inputs decoded at once: 16 KB of f32
const int64_t M_BLOCK = 128;  // rows per pass over a tile: their sums take 32 KB

// The step of 8 inputs a kilobyte ahead: as far as one core sees to it that loads of the L3 overlap; at
// 4 KB products were 5 to 40 % slower.
template <int B>
HAL_INLINE void prefetch_step(const uint8_t* in) {
#pragma GCC unroll 8
  for (int i = 0; i < B; i++) __builtin_prefetch(in + 1024 + 64 * i);
}

// ---- decoding one block: 16 columns x 8 inputs

#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI

// Half a block: 64 codes as a stream to one a byte. Qword i of the stream holds 8 codes in its B
// bytes: vpermb brings them there, vpmultishiftqb moves code j to byte j. Bytes past the B are read
// as something and never looked at.
struct Unpack {
  __m512i where, shift, mask;
  __mmask64 bytes;
};

HAL_INLINE Unpack unpack_of(int bits) {
  const __m512i step = _mm512_set1_epi64(0x0706050403020100);
  const __m512i qword = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i size = _mm512_set1_epi64(bits * 0x0101010101010101);
  return {_mm512_add_epi8(_mm512_mullo_epi64(qword, size), step),
          _mm512_mullo_epi64(step, _mm512_set1_epi64(bits)),
          _mm512_set1_epi8((char)((1 << bits) - 1)), bits == 8 ? ~0ull : (1ull << 8 * bits) - 1};
}

HAL_INLINE __m512i unpack(const Unpack& u, const uint8_t* in) {
  const __m512i x = _mm512_permutexvar_epi8(u.where, _mm512_maskz_loadu_epi8(u.bytes, in));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(u.shift, x), u.mask);
}

#endif

// lanes[h][c]: inputs 4h .. 4h + 3 of column c, one a byte.
HAL_INLINE void block_lanes(const uint8_t* in, int bits, uint32_t lanes[2][16]) {
  if (bits == 4) {
    for (int i = 0; i < 16; i++) {
      uint32_t x;
      __builtin_memcpy(&x, in + 4 * i, 4);
      lanes[0][i] = x & 0x0f0f0f0f;
      lanes[1][i] = x >> 4 & 0x0f0f0f0f;
    }
    return;
  }
  if (bits == 8) {
    __builtin_memcpy(lanes, in, 128);
    return;
  }
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
  const Unpack u = unpack_of(bits);
  for (int h = 0; h < 2; h++) _mm512_storeu_si512(lanes[h], unpack(u, in + h * 8 * bits));
#else
  for (int h = 0; h < 2; h++) {
    for (int i = 0; i < 8; i++) {
      uint64_t x = 0;
      __builtin_memcpy(&x, in + (8 * h + i) * bits, bits);
#if HAL_LEVEL >= HAL_LEVEL_AVX2
      x = _pdep_u64(x, ((1ull << bits) - 1) * 0x0101010101010101);
#else
      x = spread(x, bits);
#endif
      __builtin_memcpy(lanes[h] + 2 * i, &x, 8);
    }
  }
#endif
}

// Byte j of every lane as a number.
HAL_INLINE vf byte_of(const uint32_t* lanes, int j) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512
  const __m512i x = _mm512_srl_epi32(_mm512_loadu_si512(lanes), _mm_cvtsi32_si128(8 * j));
  return _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(255)));
#elif HAL_LEVEL == HAL_LEVEL_AVX2
  const __m128i by = _mm_cvtsi32_si128(8 * j);
  const __m256i a = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)lanes), by);
  const __m256i b = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)(lanes + 8)), by);
  const __m256i byte = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(a, byte)),
          _mm256_cvtepi32_ps(_mm256_and_si256(b, byte))};
#else
  vi x;
  __builtin_memcpy(&x, lanes, 64);
  return __builtin_convertvector(x >> 8 * j & 255, vf);
#endif
}

HAL_INLINE vf zero_of(const HalTiles& w, int64_t tile, int64_t g, int v) {
  if (!w.zero) return set1((float)(1 << (w.s.bits - 1)));
  return load_codes(w.zero + (tile * w.s.groups + g) * TILE + 16 * v);
}

HAL_INLINE vf scale_of(const HalTiles& w, int64_t tile, int64_t g, int v) {
  return load_any(w.scale, (tile * w.s.groups + g) * TILE + 16 * v, 16, w.s.scale_dtype);
}

// `inputs` (a multiple of 8) of a tile from padded input k, as code - zero: t[k][64].
HAL_INLINE void decode_f32(const HalTiles& w, int64_t tile, int64_t g, int64_t k, int64_t inputs,
                           float* t) {
  const uint8_t* in = tile_codes(w, tile, k);
  for (int64_t i = 0; i < inputs; i += 8) {
    for (int v = 0; v < 4; v++, in += block_bytes(w.s.bits)) {
      uint32_t lanes[2][16];
      block_lanes(in, w.s.bits, lanes);
      const vf zero = zero_of(w, tile, g, v);
      for (int j = 0; j < 8; j++) {
        store<HAL_F32>(t + (i + j) * TILE + 16 * v, sub(byte_of(lanes[j / 4], j % 4), zero));
      }
    }
  }
}

// ---- f32: sums[rows][64] += scale * (x [rows, inputs] . t)

template <int R>
HAL_INLINE void multiply_f32(const float* x, int64_t ldx, const float* t, int64_t inputs,
                             const float* scales, float* sums) {
  for (int v0 = 0; v0 < 4; v0 += NV) {
    vf acc[R][NV];
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < NV; v++) acc[r][v] = set1(0);
    }
    for (int64_t k = 0; k < inputs; k++) {
      vf b[NV];
      for (int v = 0; v < NV; v++) b[v] = load<HAL_F32>(t + k * TILE + 16 * (v0 + v));
      for (int r = 0; r < R; r++) {
        const vf a = set1(x[r * ldx + k]);
        for (int v = 0; v < NV; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
      }
    }
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < NV; v++) {
        float* c = sums + r * TILE + 16 * (v0 + v);
        store<HAL_F32>(c, fma(load<HAL_F32>(scales + 16 * (v0 + v)), acc[r][v], load<HAL_F32>(c)));
      }
    }
  }
}

// Calls body with 1 .. MR rows as a compile-time constant until `rows` are done.
template <int R>
struct Rows {
  static const int value = R;
};
template <class Body>
HAL_INLINE void each_rows(int64_t rows, Body body) {
  for (int64_t r = 0; r < rows; r += MR) {
    switch (rows - r) {
      case 1: body(Rows<1>(), r); break;
      case 2: body(Rows<MR < 2 ? MR : 2>(), r); break;
      case 3: body(Rows<MR < 3 ? MR : 3>(), r); break;
      case 4: body(Rows<MR < 4 ? MR : 4>(), r); break;
      case 5: body(Rows<MR < 5 ? MR : 5>(), r); break;
      default: body(Rows<MR>(), r);
    }
  }
}

static void block_f32(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  alignas(64) float t[CHUNK * TILE], scales[TILE];
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g)), start = group_start(w.s, g);
    for (int v = 0; v < 4; v++) store<HAL_F32>(scales + 16 * v, scale_of(w, tile, g, v));
    for (int64_t i = 0; i < inputs; i += CHUNK) {
      const int64_t n = inputs - i < CHUNK ? inputs - i : CHUNK;
      decode_f32(w, tile, g, start + i, n, t);
      const float* x = (const float*)a.prepared + row * w.kp + start + i;
      each_rows(rows, [&](auto r, int64_t m) __attribute__((always_inline)) {
        multiply_f32<decltype(r)::value>(x + m * w.kp, w.kp, t, n, scales, sums + m * TILE);
      });
    }
  }
}

static int64_t size_f32(const HalGemm& a) { return a.m * a.w.kp * 4; }

// x as f32, every group padded with zeros to a multiple of 8.
static void prepare_f32(const HalGemm& a, int64_t row, int64_t end) {
  by_dtype(a.w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    for (int64_t r = row; r < end; r++) {
      const Stored<F>* x = (const Stored<F>*)a.x + r * a.w.s.k;
      float* out = (float*)a.prepared + r * a.w.kp;
      for (int64_t g = 0; g < a.w.s.groups; g++) {
        const int64_t n = group_inputs(a.w.s, g), start = group_start(a.w.s, g);
        for (int64_t i = 0; i < padded(n); i += 16) {
          store_n<HAL_F32>(out + start + i, load_n<F>(x + g * a.w.s.width + i, n - i),
                           padded(n) - i);
        }
      }
    }
  });
}

// ---- both: from sums to the output

template <int F>
HAL_INLINE void finish(const HalGemm& a, int64_t tile, int64_t row, int64_t rows,
                       const float* sums) {
  const int64_t at = tile * TILE - a.first, from = at < 0 ? -at : 0;
  const int64_t to = a.n - at < TILE ? a.n - at : TILE;
  for (int64_t r = 0; r < rows; r++) {
    Stored<F>* out = (Stored<F>*)a.out + (row + r) * a.ldo + at;
    for (int64_t c = from; c < to; c += 16) {
      vf y = load<HAL_F32>(sums + r * TILE + c);
      if (a.bias) y = add(y, load_any(a.bias, at + c, to - c, a.bias_dtype));
      store_n<F>(out + c, y, to - c);
    }
  }
}

// What a level multiplies with: f32 everywhere; bf16 dot products or matrices where it has them.
struct Path {
  void (*block)(const HalGemm&, int64_t tile, int64_t row, int64_t rows, float* sums);
  void (*prepare)(const HalGemm&, int64_t row, int64_t end);
  int64_t (*prepared)(const HalGemm&);                                    // bytes
  void (*end)() = nullptr;                                                // after the last block
  void (*tiles)(const HalGemm&, int64_t tile, int64_t end) = nullptr;  // instead of blocks
};

static Path path_of(const HalGemm& a);

static int64_t prepared_size(const HalGemm* a) { return path_of(*a).prepared(*a); }

static void prepare_rows(const HalGemm* a, int64_t row, int64_t end) {
  path_of(*a).prepare(*a, row, end);
}

static void gemm_tiles(const HalGemm* a, int64_t tile, int64_t end) {
  const Path path = path_of(*a);
  if (path.tiles) return path.tiles(*a, tile, end);
  alignas(64) float sums[M_BLOCK * TILE + 16];  // finish reads up to 15 past the last row
  // Rows outside: a block of x stays in L2 while the tiles pass by.
  for (int64_t row = 0; row < a->m; row += M_BLOCK) {
    for (int64_t i = tile; i < end; i++) {
      const int64_t rows = a->m - row < M_BLOCK ? a->m - row : M_BLOCK;
      for (int64_t c = 0; c < rows * TILE; c += 16) store<HAL_F32>(sums + c, set1(0));
      path.block(*a, i, row, rows, sums);
      by_dtype(a->w.s.dtype, [&](auto dtype) {
        finish<decltype(dtype)::value>(*a, i, row, rows, sums);
      });
    }
  }
  if (path.end) path.end();
}

}  // namespace

#if HAL_LEVEL == HAL_LEVEL_AVX2 || defined(__ARM_FEATURE_DOTPROD)
#include "gemm_dot.h"
#endif

#if HAL_LEVEL < HAL_LEVEL_AVX512

namespace {

static Path path_of(const HalGemm& a) {
#if HAL_LEVEL == HAL_LEVEL_AVX2 || defined(__ARM_FEATURE_DOTPROD)
  if ((a.way == HAL_FAST || a.m <= DOT_ROWS) && sums_fit(a.w.s)) return dot_path(a);
#endif
  (void)a;
  return {block_f32, prepare_f32, size_f32};
}

}  // namespace

#endif

#if HAL_LEVEL >= HAL_LEVEL_AVX512
#include "gemm_avx512.h"
#endif
