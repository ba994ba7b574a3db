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

// The step of 8 inputs a kilobyte ahead: as far as one core sees to it that loads of the L3 overlap, where
// the L1 holds more than the weight.
template <int B>
HAL_INLINE void prefetch_step(const uint8_t* in) {
#pragma GCC unroll 8
  for (int i = 0; i < B; i++) __builtin_prefetch(in + 1024 + 64 * i);
}

// Where it holds nothing else: 2 KB ahead to the L1, 4 KB ahead to the L2. The L1 has room for few lines on
// their way from memory, the L2 for three times as many: without the second 4 bits from memory were read at
// .94 of the probe on one thread instead of 1.03, and at .85 on two instead of .96.
template <int B>
HAL_INLINE void prefetch_far(const uint8_t* in) {
#pragma GCC unroll 8
  for (int i = 0; i < B; i++) {
    __builtin_prefetch(in + 2048 + 64 * i);
    __builtin_prefetch(in + 4096 + 64 * i, 0, 2);
  }
}

// ---- decoding one block: 16 columns x 8 inputs

#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI

// A piece of a step (`Piece`) to one code a byte. Qword i of a stream of bits holds 8 codes in B bytes:
// vpermb brings them there, vpmultishiftqb moves code j to byte j. The last piece is read from its end, so
// that no load leaves the step; one with a mask would cost an operation of its own.
template <int B>
struct Unpack {
  __m512i where, shift, mask;

  HAL_MEMBER Unpack() {
    const __m512i byte = _mm512_set1_epi64(0x0706050403020100);
    const __m512i qword = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i size = _mm512_set1_epi64(B * 0x0101010101010101);
    where = _mm512_add_epi8(_mm512_mullo_epi64(qword, size), byte);
    shift = _mm512_mullo_epi64(byte, _mm512_set1_epi64(B));
    mask = _mm512_set1_epi8((char)((1 << B) - 1));
    // Known constants GCC would load again for every piece: 3 bits took 1.1 times as long.
    if (!Piece<B>::fields) __asm__("" : "+v"(where), "+v"(shift), "+v"(mask));
  }

  HAL_MEMBER __m512i piece(const uint8_t* step, int i) const {
    const int at = Piece<B>::bytes(i), last = (int)step_bytes(B) - 64, from = at < last ? at : last;
    __m512i x = _mm512_loadu_si512(step + from);
    if (B == 8) return x;
    if (Piece<B>::fields) {
      if (Piece<B>::shift(i)) x = _mm512_srli_epi16(x, (unsigned)Piece<B>::shift(i));
    } else {
      const __m512i moved = _mm512_add_epi8(where, _mm512_set1_epi8((char)(at - from)));
      x = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(at == from ? where : moved, x));
    }
    return _mm512_and_si512(x, mask);
  }
};

#endif

// lanes[h][c]: inputs 4h .. 4h + 3 of column c of block v, one a byte.
template <int B>
HAL_INLINE void block_lanes(const uint8_t* step, int v, uint32_t lanes[2][16]) {
  for (int h = 0; h < 2; h++) {
    const uint8_t* in = step + Piece<B>::bytes(2 * v + h);
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
    if (!Piece<B>::fields) {
      _mm512_storeu_si512(lanes[h], Unpack<B>().piece(step, 2 * v + h));
      continue;
    }
#endif
    for (int i = 0; i < 8; i++) {
      uint64_t x = 0;
      if (Piece<B>::fields) {
        x = load_u64(in + 8 * i) >> Piece<B>::shift(2 * v + h) & every_byte((1 << B) - 1);
      } else {
        __builtin_memcpy(&x, in + i * B, B);
        x = apart<B>(x);
      }
      __builtin_memcpy(lanes[h] + 2 * i, &x, 8);
    }
  }
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
template <int B>
static void decode_f32(const HalTiles& w, int64_t tile, int64_t g, int64_t k, int64_t inputs,
                           float* t) {
  const uint8_t* in = tile_codes(w, tile, k);
  for (int64_t i = 0; i < inputs; i += 8, in += step_bytes(B)) {
    for (int v = 0; v < 4; v++) {
      uint32_t lanes[2][16];
      block_lanes<B>(in, v, lanes);
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
      by_bits(w.s.bits, [&](auto bits) { decode_f32<decltype(bits)::value>(w, tile, g, start + i, n, t); });
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
