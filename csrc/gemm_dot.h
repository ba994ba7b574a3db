// SPDX-License-Identifier: Apache-2.0
// Few rows without AVX-512: integer dot products of the codes as they are stored. x is one s8 digit
// with a scale per group (fast), or exactly P signed digits of base 256 of a fixed point number whose
// unit is a power of two per group (digits.h): 22 bits for bf16 and f16, 30 for
// f32. Sums of a group are whole numbers, and zero points leave them as whole numbers.
#pragma once
#include "digits.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

// Rows up to which exact products come from here. 4096 x 4096 in 4 bits, as fractions of the time of
// torch's int4 product in the same run: AVX2 0.78 at 5 rows where the f32 tile takes 0.57, AVX-VNNI
// 0.52 at 16 where it takes 0.64.
#ifdef __AVXVNNI__
const int64_t DOT_ROWS = 16;
#else
const int64_t DOT_ROWS = 4;
#endif

#if HAL_LEVEL == HAL_LEVEL_AVX2
typedef __m256i Quarter;  // 32 bytes: 4 inputs of 8 columns
const int QUARTERS = 2;   // of 16 columns

HAL_INLINE Quarter load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
template <int B>
HAL_INLINE Quarter field(Quarter x, int shift) {
  return B == 8 ? x : _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8((1 << B) - 1));
}
HAL_INLINE Quarter broadcast(int32_t four) { return _mm256_set1_epi32(four); }

#ifdef __AVXVNNI__

struct Sum {
  __m256i whole = _mm256_setzero_si256();
};
template <int B>
const int BEFORE_FLUSH = 1 << 20;

template <int B>
HAL_INLINE void dot(Sum& s, Quarter codes, Quarter x) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s.whole) : "x"(codes), "x"(x));
}
HAL_INLINE void flush(Sum&) {}

#else

// Pairs of products in 16 bits, 128 * 2 * the largest code each, until they might overflow.
struct Sum {
  __m256i whole = _mm256_setzero_si256(), pairs = _mm256_setzero_si256();
};
template <int B>
const int BEFORE_FLUSH = 32767 / (256 * ((1 << B) - 1));

template <int B>
HAL_INLINE void dot(Sum& s, Quarter codes, Quarter x) {
  if constexpr (B < 8) {
    s.pairs = _mm256_add_epi16(s.pairs, _mm256_maddubs_epi16(codes, x));
    return;
  }
  const __m256i low = _mm256_maddubs_epi16(field<4>(codes, 0), x);
  const __m256i high = _mm256_maddubs_epi16(field<4>(codes, 4), x);
  s.whole = _mm256_add_epi32(s.whole, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  s.whole = _mm256_add_epi32(s.whole, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
HAL_INLINE void flush(Sum& s) {
  s.whole = _mm256_add_epi32(s.whole, _mm256_madd_epi16(s.pairs, _mm256_set1_epi16(1)));
  s.pairs = _mm256_setzero_si256();
}

#endif

HAL_INLINE void store_sum(int32_t* p, const Sum& s) { _mm256_storeu_si256((__m256i*)p, s.whole); }

#else

typedef uint8x16_t Quarter;  // 16 bytes: 4 inputs of 4 columns
const int QUARTERS = 4;

struct Sum {
  int32x4_t whole = vdupq_n_s32(0);
};
template <int B>
const int BEFORE_FLUSH = 1 << 20;

HAL_INLINE Quarter load_bytes(const uint8_t* p) { return vld1q_u8(p); }
template <int B>
HAL_INLINE Quarter field(Quarter x, int shift) {
  return B == 8 ? x : vandq_u8(vshlq_u8(x, vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((1 << B) - 1));
}
HAL_INLINE Quarter broadcast(int32_t four) { return vreinterpretq_u8_s32(vdupq_n_s32(four)); }

// Without i8mm both sides are signed: codes of 8 bits are taken as code - 128.
template <int B>
HAL_INLINE void dot(Sum& s, Quarter codes, Quarter x) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  s.whole = vusdotq_s32(s.whole, codes, vreinterpretq_s8_u8(x));
#else
  if (B == 8) codes = veorq_u8(codes, vdupq_n_u8(128));
  s.whole = vdotq_s32(s.whole, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
#endif
}
HAL_INLINE void flush(Sum&) {}
HAL_INLINE void store_sum(int32_t* p, const Sum& s) { vst1q_s32(p, s.whole); }

#endif

// What `dot` has taken off every code.
template <int B>
HAL_INLINE int32_t taken_off() {
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
  return B == 8 ? 128 : 0;
#else
  return 0;
#endif
}

// Four inputs of 16 columns: a piece of a step (`Piece`).
template <int B>
HAL_INLINE void load_piece(const uint8_t* step, int piece, Quarter q[QUARTERS]) {
  const int size = 64 / QUARTERS;
  const uint8_t* in = step + Piece<B>::bytes(piece);
  uint8_t bytes[64];
  for (int i = 0; i < 8 && !Piece<B>::fields; i++) {
    uint64_t x = 0;
    __builtin_memcpy(&x, in + i * B, B);
    x = apart<B>(x);
    __builtin_memcpy(bytes + 8 * i, &x, 8);
  }
  for (int i = 0; i < QUARTERS; i++) {
    q[i] = Piece<B>::fields ? field<B>(load_bytes(in + size * i), Piece<B>::shift(piece))
                            : load_bytes(bytes + size * i);
  }
}

// Prepared x: digits s8 [m, P, kp], units f32 [m, groups], sums of digits i32 [m, P, groups].
struct Digits {
  int8_t* digits;
  float* unit;
  int32_t* sums;
};

HAL_INLINE int64_t digit_bytes(const HalGemm& a) {
  return (a.m * digits_of(a) * a.w.kp + 63) & ~(int64_t)63;
}

HAL_INLINE Digits digits_in(const HalGemm& a) {
  float* unit = (float*)((char*)a.prepared + digit_bytes(a));
  return {(int8_t*)a.prepared, unit, (int32_t*)(unit + a.m * a.w.s.groups)};
}

static int64_t size_dot(const HalGemm& a) {
  return digit_bytes(a) + (1 + digits_of(a)) * a.m * a.w.s.groups * 4;
}

template <int F, int P>
HAL_INLINE void split(const Stored<F>* x, int64_t n, float unit, int8_t* out, int64_t next) {
  const vf inverse = set1(1 / unit);
  each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    float whole[16];
    store<HAL_F32>(whole, rne(mul(load_n<F>(x + i, left), inverse)));
    for (int p = 0; p < P; p++) {
      int8_t digit[16];
      for (int j = 0; j < 16; j++) {
        const uint32_t y = (uint32_t)(int32_t)whole[j] + (0x80808080u >> (32 - 8 * P));
        digit[j] = (int8_t)(y >> 8 * p ^ 128);
      }
      for (int64_t j = 0; j < left; j++) out[p * next + i + j] = digit[j];
    }
  });
}

template <int F, int P>
HAL_INLINE void prepare_group(const HalGemm& a, const Digits& to, int64_t r, int64_t g) {
  const HalTiles& w = a.w;
  const int64_t n = group_inputs(w.s, g);
  const Stored<F>* x = (const Stored<F>*)a.x + r * w.s.k + g * w.s.width;
  int8_t* digits = to.digits + r * P * w.kp + group_start(w.s, g);
  float& unit = to.unit[r * w.s.groups + g];
  unit = P == 1 ? act_scale<F>(x, n) : unit_of<F>(x, n, 8 * P - 2);
  if (P == 1) act_codes<F>(x, n, unit, digits);
  else split<F, P>(x, n, unit, digits, w.kp);
  for (int p = 0; p < P; p++) {
    int8_t* own = digits + p * w.kp;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += own[i];
    for (int64_t i = n; i < padded(n); i++) own[i] = 0;
    to.sums[(r * P + p) * w.s.groups + g] = sum;
  }
}

static void prepare_dot(const HalGemm& a, int64_t row, int64_t end) {
  const Digits to = digits_in(a);
  by_dtype(a.w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    for (int64_t r = row; r < end; r++) {
      for (int64_t g = 0; g < a.w.s.groups; g++) {
        if (a.way == HAL_FAST) prepare_group<F, 1>(a, to, r, g);
        else prepare_group<F, F == HAL_F32 ? 4 : 3>(a, to, r, g);
      }
    }
  });
}

// Sums of one group: R rows of P digits times the 16 columns of block v, dots[row and digit][16].
template <int P, int R, int B>
HAL_INLINE void dots_of(const uint8_t* in, int v, const int8_t* x, int64_t kp, int64_t inputs,
                        int32_t (*dots)[16]) {
  const int D = R * P;
  Sum sum[D][QUARTERS];
  int left = BEFORE_FLUSH<B>;
  for (int64_t k = 0; k < inputs; k += 8, in += step_bytes(B)) {
    __builtin_prefetch(in + 1024);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      Quarter codes[QUARTERS];
      load_piece<B>(in, 2 * v + h, codes);
#pragma GCC unroll 8
      for (int d = 0; d < D; d++) {
        int32_t four;
        __builtin_memcpy(&four, x + d * kp + k + 4 * h, 4);
        const Quarter own = broadcast(four);
        for (int q = 0; q < QUARTERS; q++) dot<B>(sum[d][q], codes[q], own);
      }
      if (--left == 0 || BEFORE_FLUSH<B> == 1) {
        left = BEFORE_FLUSH<B>;
        for (int d = 0; d < D; d++) {
          for (int q = 0; q < QUARTERS; q++) flush(sum[d][q]);
        }
      }
    }
  }
  for (int d = 0; d < D; d++) {
    for (int q = 0; q < QUARTERS; q++) {
      flush(sum[d][q]);
      store_sum(dots[d] + 16 / QUARTERS * q, sum[d][q]);
    }
  }
}

template <int P, int R, int B>
HAL_INLINE void multiply_dot(const HalTiles& w, const Digits& x, int64_t row, int64_t tile,
                             float* sums) {
  const int64_t groups = w.s.groups;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g)), start = group_start(w.s, g);
    const int8_t* digits = x.digits + row * P * w.kp + start;
    for (int v = 0; v < 4; v++) {
      int32_t dots[R * P][16];
      dots_of<P, R, B>(tile_codes(w, tile, start), v, digits, w.kp, inputs, dots);
      float zeros[16];
      store<HAL_F32>(zeros, zero_of(w, tile, g, v));
      const vf scale = scale_of(w, tile, g, v);
      for (int r = 0; r < R; r++) {
        vf y = set1(0);
        for (int p = P - 1; p >= 0; p--) {
          const int32_t of_x = x.sums[((row + r) * P + p) * groups + g];
          float digit[16];
          for (int c = 0; c < 16; c++) {
            const int32_t zero = (int32_t)zeros[c] - taken_off<B>();
            digit[c] = (float)(dots[r * P + p][c] - zero * of_x);
          }
          y = fma(y, set1(256), load<HAL_F32>(digit));
        }
        y = mul(y, set1(x.unit[(row + r) * groups + g]));
        float* c = sums + r * TILE + 16 * v;
        store<HAL_F32>(c, fma(scale, y, load<HAL_F32>(c)));
      }
    }
  }
}

template <int P, int B>
static void block_dot(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const Digits x = digits_in(a);
  const int most = P == 1 ? 3 : 1;  // 16 registers
  for (int64_t m = 0; m < rows; m += most) {
    float* own = sums + m * TILE;
    if (rows - m >= most) multiply_dot<P, most, B>(a.w, x, row + m, tile, own);
    else if (rows - m == 2) multiply_dot<P, most < 2 ? most : 2, B>(a.w, x, row + m, tile, own);
    else multiply_dot<P, 1, B>(a.w, x, row + m, tile, own);
  }
}

// Whether sums of a group stay below 2^31.
HAL_INLINE bool sums_fit(const HalShape& s) { return s.width << (s.bits + 7) < (int64_t)1 << 31; }

template <int P, int B>
struct DotProduct {
  static void block(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
    block_dot<P, B>(a, tile, row, rows, sums);
  }
};

static Path dot_path(const HalGemm& a) {
  return {digits_block<DotProduct>(a), prepare_dot, size_dot};
}

}  // namespace
