// SPDX-License-Identifier: Apache-2.0
// Rounding to nearest in one pass: a matrix is read once, and what leaves the cache is what a file holds,
// codes as a stream of bits along every row (HAL_STREAM), scales and zero levels. The bits are those of
// search, quantize and pack one after the other, between which codes of a byte each went through memory:
// 0.6 to 0.9 ns a weight where this takes 0.1 to 0.2.
//
// Columns are a multiple of 32 and groups of 8, so that every group begins and ends at a byte.
#pragma once
#include "group_ops.h"
#ifndef HAL_TEAM
#include "pack_ops.h"
#endif

namespace {

#ifdef HAL_TEAM

// 16 codes, MAGIC + code each, to 2 * bits bytes: byte i is lane i's, who asks the lanes that have
// its codes one after the other.
HAL_INLINE void put_codes(vf codes, int64_t n, int bits, uint8_t* out) {
  const int bit = 8 * team_lane(), most = (6 + 2 * bits) / bits;
  uint32_t byte = 0;
  for (int i = bit / bits, end = i + most; i < end; i++) {
    const uint32_t code = bits_as<uint32_t>(team_at(codes.own, i & 15)) & 0xff;
    const int place = i * bits - bit;
    if (i < 16) byte |= place < 0 ? code >> -place : code << place;
  }
  if (bit < (n < 16 ? (int)n : 16) * bits) out[team_lane()] = (uint8_t)byte;
}

// One group of n weights to n / 8 * bits bytes.
template <int F>
HAL_INLINE void round_group(const Stored<F>* w, int64_t n, const Grid& grid, int bits, uint8_t* out) {
  each_level<F>(w, nullptr, n, grid, [&](int64_t i, vf level, int64_t left)
                                        __attribute__((always_inline)) {
    put_codes(add(level, grid.zero), left, bits, out + i / 8 * bits);
  });
}

#else

// Codes, 8 a time, to B bytes each.
template <int B>
HAL_INLINE void put_stream(const uint8_t* codes, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n / 8; i++) {
    const uint64_t x = joined<B>(load_u64(codes + 8 * i));
    __builtin_memcpy(out + B * i, &x, B);
  }
}

const int64_t CODES = 512;  // of a group at a time, in the L1

// One group of n weights to n / 8 * bits bytes.
template <int F>
HAL_INLINE void round_group(const Stored<F>* w, int64_t n, const Grid& grid, int bits, uint8_t* out) {
  alignas(64) uint8_t codes[CODES];
  for (int64_t at = 0; at < n; at += CODES) {
    const int64_t some = at_most(n - at, CODES);
    each_level<F>(w + at, nullptr, some, grid, [&](int64_t i, vf level, int64_t left)
                                                   __attribute__((always_inline)) {
      store_low_bytes_n(codes + i, add(level, grid.zero), left);
    });
    by_bits(bits, [&](auto width) {
      put_stream<decltype(width)::value>(codes, some, out + at / 8 * bits);
    });
  }
}

#endif

#if HAL_LEVEL >= HAL_LEVEL_AVX512

// Numbers of 16 bits are in order by their bits: signed, the largest is the largest if any is positive;
// unsigned, the largest is the lowest if any is negative. 32 of them a comparison.
HAL_INLINE void quick_range(const uint16_t* w, int64_t n, uint16_t* low, uint16_t* high) {
  __m512i most = _mm512_setzero_si512(), least = _mm512_set1_epi16((short)0x8000);
  const auto see = [&](__m512i x) __attribute__((always_inline)) {
    most = _mm512_max_epi16(most, x);
    least = _mm512_max_epu16(least, x);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    ahead(w + i);
    see(_mm512_loadu_si512(w + i));
  }
  if (i < n) see(_mm512_maskz_loadu_epi16((1u << (n - i)) - 1, w + i));
  const __m512i a = _mm512_shuffle_i64x2(most, least, 0x44), b = _mm512_shuffle_i64x2(most, least, 0xee);
  __m512i both = _mm512_max_epu16(a, b);  // lanes of 128: most, most, least, least
  both = _mm512_max_epu16(both, _mm512_shuffle_i64x2(both, both, 0xb1));
  both = _mm512_xor_si512(both, _mm512_set1_epi32(-1));  // there is an instruction for the smallest
  *high = (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm512_castsi512_si128(both)));
  *low = (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm512_extracti32x4_epi32(both, 2)));
}

template <int F>
HAL_INLINE Ranges quick_ranges(const HalRound& a, int64_t first, int64_t count) {
  uint16_t low[BATCH] = {}, high[BATCH] = {};
  each_of(a.s, first, count, [&](int64_t j, int64_t at, int64_t n) __attribute__((always_inline)) {
    quick_range((const uint16_t*)a.w + at, n, low + j, high + j);
  });
  return {add(load<F>(low), set1(0)), load<F>(high)};  // -0 to 0
}

// What words_of needs of a group.
HAL_INLINE Grid bare_grid(const Batch& b, int64_t j) {
  Grid g;
  g.scale = set1(lane(b.scale, j));
  g.inverse = set1(lane(b.inverse, j));
  return g;
}

// Levels, counted from zero, of 32 weights as words. The low bits of MAGIC + level are the level.
template <int F, class W>
HAL_INLINE __m512i words_of(const Stored<F>* w, const Grid& g, W way) {
  const auto bits = [&](vf x) __attribute__((always_inline)) {
    return _mm512_castps_si512(raw_level<F>(x, g, way));
  };
  if constexpr (F == HAL_BF16) {  // a word is the upper half of its float
    const __m512i x = _mm512_loadu_si512(w), upper = _mm512_set1_epi32((int)0xffff0000);
    const __m512i even = bits(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    const __m512i odd = bits(_mm512_castsi512_ps(_mm512_and_si512(x, upper)));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
  } else {
    const __m256i a = _mm512_cvtepi32_epi16(bits(load<F>(w)));
    const __m256i b = _mm512_cvtepi32_epi16(bits(load<F>(w + 16)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
}

// 64 codes of a byte each, from their levels counted from zero.
template <int B>
HAL_INLINE __m512i codes_of(__m512i a, __m512i a_zero, __m512i b, __m512i b_zero) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i both = _mm512_packus_epi16(_mm512_add_epi16(a, a_zero), _mm512_add_epi16(b, b_zero));
  return _mm512_min_epu8(_mm512_permutexvar_epi64(order, both), _mm512_set1_epi8((char)((1 << B) - 1)));
}

// Byte i of the result of put_odd: byte i % B of lane i / B.
template <int B>
struct Compaction {
  alignas(64) uint8_t at[64];
  constexpr Compaction() : at() {
    for (int i = 0; i < 8 * B; i++) at[i] = (uint8_t)(i / B * 8 + i % B);
  }
};

// The same for widths that do not divide a byte: 8 codes to B bytes in each lane of 64 bits.
template <int B>
HAL_INLINE void put_odd(__m512i codes, uint8_t* out) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
  __m512i x = codes;
  if constexpr (B == 7) {  // 2^7 is no signed byte
    const __m512i low = _mm512_and_si512(x, _mm512_set1_epi16(0xff));
    x = _mm512_or_si512(low, _mm512_srli_epi16(_mm512_xor_si512(x, low), 1));
  } else {
    x = _mm512_maddubs_epi16(x, _mm512_set1_epi16(1 << (8 + B) | 1));
  }
  x = _mm512_madd_epi16(x, _mm512_set1_epi32(1 << (16 + 2 * B) | 1));
  const __m512i upper = _mm512_slli_epi64(_mm512_srli_epi64(x, 32), 4 * B);
  x = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi64(0xffffffff)), upper);
  static constexpr Compaction<B> where;
  x = _mm512_permutexvar_epi8(_mm512_load_si512(where.at), x);
  _mm512_mask_storeu_epi8(out, (1ull << 8 * B) - 1, x);
#else
  alignas(64) uint8_t bytes[64];
  _mm512_store_si512(bytes, codes);
  put_stream<B>(bytes, 64, out);
#endif
}

// 64 codes to 8 * B bytes.
template <int B>
HAL_INLINE void put_vector(__m512i codes, uint8_t* out) {
  if constexpr (B == 8) {
    _mm512_storeu_si512(out, codes);
  } else if constexpr (B == 4) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi16_epi8(pairs));
  } else if constexpr (B == 2) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0401));
    const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(fours));
  } else {
    put_odd<B>(codes, out);
  }
}

// Levels of a batch whose weights are finite: quotients are then below 2^9 and nothing is to be looked
// after. Groups of 32, or of whole vectors of 64; what is left over is answered with its first group.
template <int F, int B, class W>
static int64_t round_vectors(const HalRound& a, const Batch& b, int64_t first, int64_t count, W way) {
  const Stored<F>* w = (const Stored<F>*)a.w;
  const auto zero_of = [&](int64_t j) __attribute__((always_inline)) {
    return _mm512_set1_epi16((short)lane(b.zero, j));
  };
  if (a.s.width == 32) {
    for (int64_t j = 0; j + 2 <= count; j += 2) {
      const int64_t at = (first + j) * 32;
      const __m512i x = words_of<F>(w + at, bare_grid(b, j), way);
      const __m512i y = words_of<F>(w + at + 32, bare_grid(b, j + 1), way);
      put_vector<B>(codes_of<B>(x, zero_of(j), y, zero_of(j + 1)), a.words + at / 8 * B);
    }
    return count & ~(int64_t)1;
  }
  if (a.s.width % 64 || a.s.k % 64) return 0;
  each_of(a.s, first, count, [&](int64_t j, int64_t at, int64_t n) __attribute__((always_inline)) {
    const Grid g = bare_grid(b, j);
    const __m512i zero = zero_of(j);
    for (int64_t i = at; i < at + n; i += 64) {
      const __m512i x = words_of<F>(w + i, g, way), y = words_of<F>(w + i + 32, g, way);
      put_vector<B>(codes_of<B>(x, zero, y, zero), a.words + i / 8 * B);
    }
  });
  return count;
}

template <int F>
HAL_INLINE int64_t round_quick(const HalRound& a, const Batch& b, int64_t first, int64_t count) {
  int64_t done = 0;
  by_bits(a.s.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    done = b.twice ? round_vectors<F, B>(a, b, first, count, Way<2>())
                   : round_vectors<F, B>(a, b, first, count, Way<1>());
  });
  return done;
}

#endif

// The ranges of groups, and whether all of it is finite (if that is asked for cheaply).
template <int F>
HAL_INLINE Ranges best_ranges(const HalRound& a, int64_t first, int64_t count, bool* finite) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512
  if constexpr (F != HAL_F32) {
    const Ranges r = quick_ranges<F>(a, first, count);
    const vf span = sub(r.amax, r.amin);
    *finite = !any_nan(span) && most(span) < __builtin_inff();
    if (*finite) return r;
  }
#endif
  *finite = false;
  return ranges_of<F>(a.s, (const Stored<F>*)a.w, first, count);
}

HAL_INLINE void put_scales(const HalRound& a, const Groups& g, int64_t first, int64_t count) {
  if (a.s.scale_dtype == HAL_F32) store_n<HAL_F32>((float*)a.scale + first, g.scale, count);
  else if (a.s.scale_dtype == HAL_BF16) store_n<HAL_BF16>((uint16_t*)a.scale + first, g.scale, count);
  else store_n<HAL_F16>((uint16_t*)a.scale + first, g.scale, count);
  if (a.zero) store_low_bytes_n(a.zero + first, add(g.zero, set1(MAGIC)), count);
}

template <int F>
HAL_INLINE void round_batch(const HalRound& a, int64_t first, int64_t count) {
  bool finite;
  const Ranges r = best_ranges<F>(a, first, count, &finite);
  const Groups groups = groups_of(a.s, r.amin, r.amax, set1(1), set1(1));
  const Batch b = batch_of(a.s, groups);
  put_scales(a, groups, first, count);
  int64_t done = 0;
#if HAL_LEVEL >= HAL_LEVEL_AVX512
  if constexpr (F != HAL_F32) {
    if (finite && b.usual) done = round_quick<F>(a, b, first, count);
  }
#endif
  each_of(a.s, first + done, count - done, [&](int64_t j, int64_t at, int64_t n)
                                               __attribute__((always_inline)) {
    const Grid grid = grid_of(b, done + j);
    round_group<F>((const Stored<F>*)a.w + at, n, grid, a.s.bits, a.words + at / 8 * a.s.bits);
  });
}

HAL_VERB void round_groups(const HalRound* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      round_batch<decltype(dtype)::value>(*a, first, count);
    });
  });
}

}  // namespace
