// SPDX-License-Identifier: Apache-2.0
// Few rows: integer dot products of the codes, as they are stored, with x as P digits of base 256.
//
// Fast: one digit, x / scale rounded to s8 with a scale per group. Exact: within a group x is a fixed
// point number of 23 bits (f32: 31) below the power of two over its largest element, so a bf16 is
// represented without error unless it is 2^-15 of that; three signed digits (four) hold it. The sum
// of a group is then exact, and 128 multiplications in two instructions where bf16 takes 32 in one:
// 0.49 ms against 0.74 for 4096 x 4096 in 4 bits, m = 1, one thread.
#pragma once
#include "digits.h"

namespace {

// Prepared x: digits s8 in the order of Place; step f32 [groups, m]; sums of the digits of chunks f32
// [chunks, m, P], which take the zero points off. Symmetric codes have one zero point: there it is
// already multiplied and added to BIAS, as an integer.
struct Digits {
  int8_t* digits;
  float *step, *sums;
  int64_t m;
};

// Places of digits: rows [m, P, kp].
struct RowDigits {
  static int64_t size(const HalGemm& a) {
    return (a.m * digits_of(a) * a.w.kp + 63) & ~(int64_t)63;
  }
  // Digit p of a chunk of row r, one after the other, zeros behind the last.
  static void put(const HalGemm& a, int digits, int64_t r, int p, const Chunk& c, const int8_t* in,
                  int8_t* out) {
    out += (r * digits + p) * a.w.kp + group_start(a.w.s, c.g) + c.i;
    for (int64_t i = 0; i < c.n; i += 64) {
      const __mmask64 some = ~0ull >> (c.n - i < 64 ? 64 - (c.n - i) : 0);
      _mm512_mask_storeu_epi8(out + i, some, _mm512_loadu_si512(in + i));
    }
  }
};

template <class Place>
HAL_INLINE Digits digits_in(const HalGemm& a) {
  float* step = (float*)((char*)a.prepared + Place::size(a));
  return {(int8_t*)a.prepared, step, step + a.m * a.w.s.groups, a.m};
}

template <class Place>
static int64_t size_digits(const HalGemm& a) {
  return Place::size(a) + (a.w.s.groups + digits_of(a) * row_chunks(a.w)) * a.m * 4;
}

// P digits of 16 inputs, one behind the other, 16 bytes each: x / step = sum of digit[p] * 256^p.
template <int P>
HAL_INLINE __m512i split(vf x, vf inverse) {
  const __m512i middle = _mm512_set1_epi32((int)(0x80808080u >> (32 - 8 * P)));
  const __m512i y = _mm512_add_epi32(_mm512_cvtps_epi32(mul(x, inverse)), middle);
  const __m128i low = _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  const __m512i digit = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i every = _mm512_mullo_epi32(digit, _mm512_set1_epi32(0x01010101));
  const __m512i from = _mm512_add_epi8(_mm512_broadcast_i32x4(low), every);
  const __m512i bytes = _mm512_permutexvar_epi8(from, y);
  return _mm512_xor_si512(bytes, _mm512_set1_epi8((char)128));
}

// An integer n below 2^22 in size, added to these bits, is the float 1.5 * 2^23 + n. Instead of a
// conversion: while the matrix unit multiplies, one port is left for conversions and products, two are
// for sums.
const int32_t BIAS = 0x4b400000;

// Digits of a chunk, digits[p], and their sums: sum p in the lanes 4p .. 4p + 3.
template <int P, int F>
HAL_INLINE __m512i digits_of_chunk(const Stored<F>* x, int64_t n, float step,
                                   int8_t digits[P][X_CHUNK]) {
  const __m512i ones = _mm512_set1_epi8(1);
  const vf inverse = set1(1 / step);
  __m512i sums = _mm512_setzero_si512();
  for (int p = 0; p < P; p++) __builtin_memset(digits[p], 0, X_CHUNK);
  for (int64_t i = 0; i < n; i += 16) {
    __m512i own;
    if constexpr (P == 1) {
      act_codes<F>(x + i, n - i < 16 ? n - i : 16, step, digits[0] + i);
      own = _mm512_zextsi128_si512(_mm_load_si128((const __m128i*)(digits[0] + i)));
    } else {
      own = split<P>(load_n<F>(x + i, n - i), inverse);
      alignas(64) int8_t all[64];
      _mm512_store_si512(all, own);
      for (int p = 0; p < P; p++) __builtin_memcpy(digits[p] + i, all + 16 * p, 16);
    }
    sums = _mm512_dpbusd_epi32(sums, ones, own);
  }
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_CDAB));
  return _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
}

template <class Place, int P, int F>
HAL_INLINE void prepare_row(const HalGemm& a, const Digits& to, int64_t r) {
  const HalTiles& w = a.w;
  float step = 0;
  for (Chunk c = first_chunk(w, 0); c.n; c = next_chunk(w, c)) {
    const int64_t inputs = group_inputs(w.s, c.g), n = inputs - c.i < c.n ? inputs - c.i : c.n;
    const Stored<F>* group = (const Stored<F>*)a.x + r * w.s.k + c.g * w.s.width;
    if (c.i == 0) {
      step = P == 1 ? act_scale<F>(group, inputs) : unit_of<F>(group, inputs, 8 * P - 2);
      to.step[c.g * to.m + r] = step;
    }
    alignas(64) int8_t digits[P][X_CHUNK];
    const __m512i sums = digits_of_chunk<P, F>(group + c.i, n, step, digits);
    const __m512i center = _mm512_slli_epi32(sums, (unsigned)w.s.bits - 1);
    const vf off = w.zero ? _mm512_cvtepi32_ps(sums)
                          : _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(BIAS), center));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    store_n<HAL_F32>(to.sums + (c.index * to.m + r) * P, _mm512_permutexvar_ps(firsts, off), P);
    for (int p = 0; p < P; p++) Place::put(a, P, r, p, c, digits[p], to.digits);
  }
}

template <class Place>
static void prepare_digits(const HalGemm& a, int64_t row, int64_t end) {
  const Digits to = digits_in<Place>(a);
  by_dtype(a.w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value, P = F == HAL_F32 ? 4 : 3;
    for (int64_t r = row; r < end; r++) {
      if (a.way == HAL_FAST) prepare_row<Place, 1, F>(a, to, r);
      else prepare_row<Place, P, F>(a, to, r);
    }
  });
}

// One row of x and a chunk: its step, and for every digit what takes the zero points off.
template <int P>
struct RowOfDigits {
  vf step, sums[P];

  HAL_MEMBER RowOfDigits(const Digits& x, int64_t row, int64_t g, int64_t chunk)
      : step(set1(x.step[g * x.m + row])) {
    for (int p = 0; p < P; p++) sums[p] = set1(x.sums[(chunk * x.m + row) * P + p]);
  }

  // sums + scale * step * (sums of digits without the zero points), 16 columns. One digit: in the order of
  // gemm_panel_s8.h, so that a row has the same bits among few rows and among many.
  template <bool ZERO>
  HAL_MEMBER vf add(const __m512i dots[P], vf scale, vf zero, vf to) const {
    const vf bias = set1(bits_as<float>(BIAS));
    vf y = set1(0);
#pragma GCC unroll 4
    for (int p = P - 1; p >= 0; p--) {
      const __m512i with = _mm512_castps_si512(ZERO ? bias : sums[p]);
      vf digit = sub(_mm512_castsi512_ps(_mm512_add_epi32(dots[p], with)), bias);
      if (ZERO) digit = _mm512_fnmadd_ps(zero, sums[p], digit);
      y = p == P - 1 ? digit : fma(y, set1(256), digit);
    }
    if (P == 1) return fma(mul(y, scale), step, to);
    return fma(scale, mul(y, step), to);
  }
};

HAL_INLINE __m512i four_at(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// GCC 12 keeps arrays of sums in memory around the intrinsic.
HAL_INLINE void dot_s8(__m512i& sum, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// R rows of P digits times one tile.
//
// In 2 bits two blocks share their bytes, and the codes of the second are multiplied where they stand, 16
// times as large: a shift of the sums takes that back. One operation on a piece and one on two, not two.
template <int P, int R, int B>
HAL_INLINE void multiply_digits(const HalTiles& w, const Digits& x, int64_t row, int64_t tile,
                                float* sums) {
  const Unpack<B> u;
  const uint8_t* in = tile_codes(w, tile, 0);
  const int D = R * P;
  const int S = D == 1 ? 2 : 1;  // chains a column: more than a dot product's latency
  const int8_t* xc = x.digits + row * P * w.kp;
  for (Chunk c = first_chunk(w, 0); c.n; xc += c.n, c = next_chunk(w, c)) {
    __m512i acc[S][D][4];
    for (int i = 0; i < S * D * 4; i++) acc[i / (D * 4)][i / 4 % D][i % 4] = _mm512_setzero_si512();
    for (int64_t k = 0; k < c.n; k += 8, in += step_bytes(B)) {
      prefetch_far<B>(in);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          if (B != 2) {
            codes[v] = u.piece(in, 2 * v + h);
            continue;
          }
          const __m512i both = _mm512_loadu_si512(in + v / 2 * 64);
          codes[v] = _mm512_and_si512(h ? _mm512_srli_epi16(both, 2) : both,
                                      _mm512_set1_epi8(v % 2 ? 3 << 4 : 3));
        }
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) {
          const __m512i four = four_at(xc + d * w.kp + k + 4 * h);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) dot_s8(acc[h % S][d][v], codes[v], four);
        }
      }
    }
    const Columns columns = columns_of(w, tile, c.g);
    for (int r = 0; r < R; r++) {
      const RowOfDigits<P> own(x, row + r, c.g, c.index);
      for (int v = 0; v < 4; v++) {
        __m512i dots[P];
        for (int p = 0; p < P; p++) {
          dots[p] = acc[0][r * P + p][v];
          if (S == 2) dots[p] = _mm512_add_epi32(dots[p], acc[S - 1][r * P + p][v]);
          if (B == 2 && v % 2) dots[p] = _mm512_srai_epi32(dots[p], 4);
        }
        float* out = sums + r * TILE + 16 * v;
        const vf scale = columns.scale[v], zero = columns.zero[v], to = load<HAL_F32>(out);
        const vf y = w.zero ? own.template add<true>(dots, scale, zero, to)
                            : own.template add<false>(dots, scale, zero, to);
        store<HAL_F32>(out, y);
      }
    }
  }
}

// Sums take four registers a digit and row; 24 leave room for the codes.
template <int P, int B>
struct VectorProduct {
  static void block(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
    const Digits x = digits_in<RowDigits>(a);
    const int most = P == 1 ? 4 : P == 3 ? 2 : 1;
    for (int64_t m = 0; m < rows; m += most) {
      few_rows(rows - m, [&](auto r) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value < most ? decltype(r)::value : most;
        multiply_digits<P, R, B>(a.w, x, row + m, tile, sums + m * TILE);
      });
    }
  }
};

template <template <int, int> class Products, class Place>
static Path digits_path(const HalGemm& a) {
  return {digits_block<Products>(a), prepare_digits<Place>, size_digits<Place>};
}

}  // namespace
