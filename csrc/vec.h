// SPDX-License-Identifier: Apache-2.0
// Sixteen f32 lanes: one zmm, two ymm, or a GCC/Clang vector that the compiler splits for SSE2 and
// NEON. Sixteen because the numeric contract sums groups in 16 lanes (hal/codec.py).
//
// Everything is in the anonymous namespace: an inline function shared by two instruction sets would
// be one weak symbol, and the linker could give AVX-512 code to a machine without it.
#pragma once
#include "floats.h"

#define HAL_LEVEL_SCALAR 0
#define HAL_LEVEL_AVX2 1
#define HAL_LEVEL_AVX512 2
#define HAL_LEVEL_AVX512VNNI 3
#define HAL_LEVEL_AMX 4

#if HAL_LEVEL >= HAL_LEVEL_AVX2
#include <immintrin.h>
#endif

#define HAL_FMA (HAL_LEVEL >= HAL_LEVEL_AVX2)  // one instruction, where fma and fnma are asked for

namespace {

// Candidates of a search tried side by side: every weight is read once for all of them.
const int ABREAST = HAL_LEVEL >= HAL_LEVEL_AVX512 ? 4 : 1;

#if HAL_LEVEL >= HAL_LEVEL_AVX512

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

HAL_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
HAL_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
HAL_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
HAL_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
HAL_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
HAL_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
HAL_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
HAL_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
HAL_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
HAL_INLINE vf rne(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | 8); }
HAL_INLINE vm lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
HAL_INLINE vm eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
HAL_INLINE bool any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
HAL_INLINE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
HAL_INLINE float first(vf a) { return _mm512_cvtss_f32(a); }
HAL_INLINE vf minus_if(vm m, vf a, vf b) { return _mm512_mask_sub_ps(a, m, a, b); }
HAL_INLINE vf plus_if(vm m, vf a, vf b) { return _mm512_mask_add_ps(a, m, a, b); }
HAL_INLINE vm lt_if(vm m, vf a, vf b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_LT_OQ); }
HAL_INLINE float least(vf a) { return _mm512_reduce_min_ps(a); }
HAL_INLINE float most(vf a) { return _mm512_reduce_max_ps(a); }
// All |a| in [2^-100, 2^100).
HAL_INLINE bool all_usual(vf a) {
  const __m512i size = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
  const __m512i above = _mm512_sub_epi32(size, _mm512_set1_epi32(27 << 23));
  return !_mm512_cmp_epu32_mask(above, _mm512_set1_epi32(200 << 23), _MM_CMPINT_NLT);
}

HAL_INLINE __m256i to_half(vf a, int f) {
  if (f == HAL_F16) return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | 8);
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                            _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

HAL_INLINE vf from_half(__m256i h, int f) {
  if (f == HAL_F16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <int F>
HAL_INLINE vf load(const Stored<F>* p) {
  if constexpr (F == HAL_F32) return _mm512_loadu_ps(p);
  else return from_half(_mm256_loadu_si256((const __m256i*)p), F);
}

template <int F>
HAL_INLINE void store(Stored<F>* p, vf a) {
  if constexpr (F == HAL_F32) _mm512_storeu_ps(p, a);
  else _mm256_storeu_si256((__m256i*)p, to_half(a, F));
}

HAL_INLINE vf load_codes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
HAL_INLINE void store_codes(uint8_t* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
HAL_INLINE void store_low_bytes(uint8_t* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(a)));
}

HAL_INLINE __m256 halves_added(vf a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

#elif HAL_LEVEL == HAL_LEVEL_AVX2

struct vf {
  __m256 a, b;
};
struct vm {
  __m256 a, b;
};

#define HAL_PAIR(name, op) \
  HAL_INLINE vf name(vf x, vf y) { return {op(x.a, y.a), op(x.b, y.b)}; }
HAL_PAIR(add, _mm256_add_ps)
HAL_PAIR(sub, _mm256_sub_ps)
HAL_PAIR(mul, _mm256_mul_ps)
HAL_PAIR(div, _mm256_div_ps)
HAL_PAIR(min, _mm256_min_ps)
HAL_PAIR(max, _mm256_max_ps)
#undef HAL_PAIR

HAL_INLINE vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HAL_INLINE vf fma(vf x, vf y, vf z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
HAL_INLINE vf fnma(vf x, vf y, vf z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
HAL_INLINE vf rne(vf x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | 8),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | 8)};
}
HAL_INLINE vm lt(vf x, vf y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
HAL_INLINE vm eq(vf x, vf y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
HAL_INLINE bool any_nan(vf x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q));
}
HAL_INLINE vm both(vm x, vm y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
HAL_INLINE vf select(vm m, vf x, vf y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
HAL_INLINE float first(vf x) { return _mm256_cvtss_f32(x.a); }
HAL_INLINE vf minus_if(vm m, vf x, vf y) {
  return {_mm256_sub_ps(x.a, _mm256_and_ps(m.a, y.a)), _mm256_sub_ps(x.b, _mm256_and_ps(m.b, y.b))};
}
HAL_INLINE vf plus_if(vm m, vf x, vf y) {
  return {_mm256_add_ps(x.a, _mm256_and_ps(m.a, y.a)), _mm256_add_ps(x.b, _mm256_and_ps(m.b, y.b))};
}
HAL_INLINE vm lt_if(vm m, vf x, vf y) { return both(m, lt(x, y)); }
HAL_INLINE float least(vf x) {
  const __m256 h = _mm256_min_ps(x.a, x.b);
  __m128 q = _mm_min_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_min_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_min_ss(q, _mm_movehdup_ps(q)));
}
HAL_INLINE float most(vf x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
HAL_INLINE bool all_usual(vf x) {
  const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 a = _mm256_and_ps(x.a, size), b = _mm256_and_ps(x.b, size);
  const __m256 low = _mm256_min_ps(a, b), high = _mm256_max_ps(a, b);
  const __m256 in = _mm256_and_ps(_mm256_cmp_ps(low, _mm256_set1_ps(0x1p-100f), _CMP_GE_OQ),
                                  _mm256_cmp_ps(high, _mm256_set1_ps(0x1p100f), _CMP_LT_OQ));
  return _mm256_movemask_ps(in) == 255;
}

HAL_INLINE __m256i bf16_words(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan), 16);
}

HAL_INLINE __m256i to_half(vf x, int f) {
  if (f == HAL_F16) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | 8),
                            _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | 8));
  }
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_words(x.a), bf16_words(x.b)), 0xd8);
}

HAL_INLINE vf from_half(__m256i h, int f) {
  const __m128i low = _mm256_castsi256_si128(h), high = _mm256_extracti128_si256(h, 1);
  if (f == HAL_F16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}

template <int F>
HAL_INLINE vf load(const Stored<F>* p) {
  if constexpr (F == HAL_F32) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  else return from_half(_mm256_loadu_si256((const __m256i*)p), F);
}

template <int F>
HAL_INLINE void store(Stored<F>* p, vf x) {
  if constexpr (F == HAL_F32) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  } else {
    _mm256_storeu_si256((__m256i*)p, to_half(x, F));
  }
}

HAL_INLINE vf load_codes(const uint8_t* p) {
  const __m128i c = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(c)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(c, 8)))};
}
HAL_INLINE void store_codes(uint8_t* p, vf x) {
  const __m256i w = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(w),
                                                 _mm256_extracti128_si256(w, 1)));
}

HAL_INLINE void store_low_bytes(uint8_t* p, vf x) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i w = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(x.a), byte),
                          _mm256_and_si256(_mm256_castps_si256(x.b), byte)), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(w),
                                                 _mm256_extracti128_si256(w, 1)));
}

HAL_INLINE __m256 halves_added(vf x) { return _mm256_add_ps(x.a, x.b); }

#else

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef vi vm;

HAL_INLINE vf set1(float x) { return vf{} + x; }
HAL_INLINE vf add(vf a, vf b) { return a + b; }
HAL_INLINE vf sub(vf a, vf b) { return a - b; }
HAL_INLINE vf mul(vf a, vf b) { return a * b; }
HAL_INLINE vf div(vf a, vf b) { return a / b; }
HAL_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
HAL_INLINE vm lt(vf a, vf b) { return a < b; }
HAL_INLINE vm eq(vf a, vf b) { return a == b; }
HAL_INLINE vf select(vm m, vf a, vf b) { return m ? a : b; }
HAL_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
HAL_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
HAL_INLINE float first(vf a) { return a[0]; }
HAL_INLINE vf minus_if(vm m, vf a, vf b) { return a - (vf)((vi)b & m); }
HAL_INLINE vf plus_if(vm m, vf a, vf b) { return a + (vf)((vi)b & m); }
HAL_INLINE vm lt_if(vm m, vf a, vf b) { return m & (a < b); }
HAL_INLINE float least(vf x) {
  float y = x[0];
  for (int i = 1; i < 16; i++) y = x[i] < y ? x[i] : y;
  return y;
}
HAL_INLINE float most(vf x) {
  float y = x[0];
  for (int i = 1; i < 16; i++) y = x[i] > y ? x[i] : y;
  return y;
}

// Below 2^23 adding and taking away 2^23 rounds to an integer, half to even; above, x is one.
HAL_INLINE vf rne(vf x) {
  const vi sign = (vi)x & (int32_t)0x80000000;
  const vf size = (vf)((vi)x ^ sign);
  const vf rounded = (vf)((vi)((size + 8388608.0f) - 8388608.0f) | sign);
  return select(size < set1(8388608.0f), rounded, x);
}

template <int F>
HAL_INLINE vf load(const Stored<F>* p) {
  vf x;
  if constexpr (F == HAL_F32) {
    __builtin_memcpy(&x, p, 64);
  } else {
    for (int i = 0; i < 16; i++) {
      x[i] = F == HAL_F16 ? from_f16(p[i]) : bits_as<float>((uint32_t)p[i] << 16);
    }
  }
  return x;
}

template <int F>
HAL_INLINE void store(Stored<F>* p, vf x) {
  if constexpr (F == HAL_F32) {
    __builtin_memcpy(p, &x, 64);
  } else {
    for (int i = 0; i < 16; i++) p[i] = F == HAL_F16 ? to_f16(x[i]) : to_bf16(x[i]);
  }
}

HAL_INLINE vf load_codes(const uint8_t* p) {
  vf x;
  for (int i = 0; i < 16; i++) x[i] = (float)p[i];
  return x;
}
HAL_INLINE void store_codes(uint8_t* p, vf x) {
  for (int i = 0; i < 16; i++) p[i] = (uint8_t)(int32_t)x[i];
}
HAL_INLINE void store_low_bytes(uint8_t* p, vf x) {
  const vi bits = (vi)x;
  for (int i = 0; i < 16; i++) p[i] = (uint8_t)bits[i];
}

#endif

// Sum of the lanes, folded 8, 4, 2, 1: part of the numeric contract.
HAL_INLINE float fold(vf x) {
#if HAL_LEVEL >= HAL_LEVEL_AVX2
  const __m256 h = halves_added(x);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
  float a[16];
  __builtin_memcpy(a, &x, 64);
  for (int half = 8; half; half /= 2) {
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  }
  return a[0];
#endif
}

// One number of each lane, to be picked by its index.
struct Lanes {
  alignas(64) float at[16];
};
HAL_INLINE Lanes lanes_of(vf x) {
  Lanes l;
  store<HAL_F32>(l.at, x);
  return l;
}
HAL_INLINE vf vector_of(const Lanes& l) { return load<HAL_F32>(l.at); }
HAL_INLINE float lane(const Lanes& l, int64_t i) { return l.at[i]; }
HAL_INLINE void set_lane(Lanes& l, int64_t i, float x) { l.at[i] = x; }

// Lane i of each: the folded sum of a vector.
template <int C>
HAL_INLINE void set_folds(Lanes (&l)[C], int64_t i, const vf (&x)[C]) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512
  if constexpr (C == 4) {  // two halves, four quarters side by side: 13 operations instead of 32
    const auto join = [](vf a, vf b) __attribute__((always_inline)) {
      return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const vf low = join(x[0], x[1]), high = join(x[2], x[3]);
    vf all = add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    all = add(all, _mm512_permute_ps(all, 0x4e));
    all = add(all, _mm512_permute_ps(all, 0xb1));
    l[0].at[i] = _mm512_cvtss_f32(all);
    l[1].at[i] = _mm_cvtss_f32(_mm512_extractf32x4_ps(all, 1));
    l[2].at[i] = _mm_cvtss_f32(_mm512_extractf32x4_ps(all, 2));
    l[3].at[i] = _mm_cvtss_f32(_mm512_extractf32x4_ps(all, 3));
    return;
  }
#endif
  for (int c = 0; c < C; c++) set_lane(l[c], i, fold(x[c]));
}

// Calls body(i, n) for 16 elements at a time, then for the n < 16 that are left. Two copies of the
// body: a short tail copies memory by calls, and around a call no vector stays in a register.
template <class Body>
HAL_INLINE void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, (int64_t)16);
  if (i < n) body(i, n - i);
}

// Hardware follows a stream up to the end of a 4 KB page only; 67 million weights through qdq_step
// took 1.35 ns each without this, 0.69 with 2 KB, a twentieth less with 3.
template <class T>
HAL_INLINE void ahead(const T* p) {
  __builtin_prefetch((const char*)p + 3072);
}

// The first n < 16 elements, the other lanes zero.
template <int F>
HAL_INLINE vf load_n(const Stored<F>* p, int64_t n) {
  if (n >= 16) return load<F>(p);
  Stored<F> part[16] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load<F>(part);
}

template <int F>
HAL_INLINE void store_n(Stored<F>* p, vf x, int64_t n) {
  if (n >= 16) return store<F>(p, x);
  Stored<F> part[16];
  store<F>(part, x);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

// store_n of numbers none of which is subnormal: the instruction takes those for zero.
template <int F>
HAL_INLINE void store_normal_n(Stored<F>* p, vf x, int64_t n) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
  if constexpr (F == HAL_BF16) {
    const __m256i h = (__m256i)_mm512_cvtneps_pbh(x);
    if (n >= 16) return _mm256_storeu_si256((__m256i*)p, h);
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1 << n) - 1), h);
  }
#endif
  store_n<F>(p, x, n);
}

HAL_INLINE vf load_codes_n(const uint8_t* p, int64_t n) {
  if (n >= 16) return load_codes(p);
  uint8_t part[16] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load_codes(part);
}

HAL_INLINE void store_low_bytes_n(uint8_t* p, vf x, int64_t n) {
  if (n >= 16) return store_low_bytes(p, x);
  uint8_t part[16];
  store_low_bytes(part, x);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

// x after a round trip through a storage dtype.
HAL_INLINE vf rounded(vf x, int f) {
  if (f == HAL_F32) return x;
  uint16_t h[16];
  if (f == HAL_BF16) {
    store<HAL_BF16>(h, x);
    return load<HAL_BF16>(h);
  }
  store<HAL_F16>(h, x);
  return load<HAL_F16>(h);
}

HAL_INLINE void store_float(void* p, int64_t i, float x, int f) {
  if (f == HAL_F32) {
    ((float*)p)[i] = x;
    return;
  }
  uint16_t h[16];
  if (f == HAL_BF16) store<HAL_BF16>(h, set1(x));
  else store<HAL_F16>(h, set1(x));
  ((uint16_t*)p)[i] = h[0];
}

HAL_INLINE vf load_any(const void* p, int64_t i, int64_t n, int f) {
  if (f == HAL_F32) return load_n<HAL_F32>((const float*)p + i, n);
  if (f == HAL_BF16) return load_n<HAL_BF16>((const uint16_t*)p + i, n);
  return load_n<HAL_F16>((const uint16_t*)p + i, n);
}

}  // namespace
