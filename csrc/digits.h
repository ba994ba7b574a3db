// SPDX-License-Identifier: Apache-2.0
// x as signed digits of base 256 for integer dot products: what gemm_s8.h and gemm_dot.h share.
#pragma once

namespace {

// One with a scale per group (fast); else as many as hold a fixed point number of 22 bits and a sign,
// for f32 of 30.
HAL_INLINE int digits_of(const HalGemm& a) { return a.way == HAL_FAST ? 1 : a.w.s.dtype == HAL_F32 ? 4 : 3; }

HAL_INLINE uint16_t bits_of(uint16_t x) { return x; }
HAL_INLINE uint32_t bits_of(float x) { return bits_as<uint32_t>(x); }

// The bits of the largest of n numbers as f32, signs taken off; above those of infinity where one is NaN.
template <int F>
HAL_INLINE uint32_t largest_of(const Stored<F>* x, int64_t n) {
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i size = _mm512_castps_si512(load_n<F>(x + i, n - i));
    most = _mm512_max_epu32(most, _mm512_and_si512(size, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epu32(most);
#else
  typedef decltype(bits_of(Stored<F>())) Word;
  Word most = 0;
  for (int64_t i = 0; i < n; i++) {
    const Word size = bits_of(x[i]) & (Word)((Word)~(Word)0 >> 1);
    most = size > most ? size : most;
  }
  const Stored<F> largest = bits_as<Stored<F>>(most);
  return bits_as<uint32_t>(first(load_n<F>(&largest, 1)));
#endif
}

// A power of two, so that x = unit * a number below 2^bits; at least 2^-126, so that its inverse is
// finite. NaN, and so is the row of the product, where x is not finite.
template <int F>
HAL_INLINE float unit_of(const Stored<F>* x, int64_t n, int bits) {
  const uint32_t amax = largest_of<F>(x, n);
  if (amax >= 0x7f800000) return bits_as<float>(0x7fc00000u);
  const int least = bits - 126, found = (int)(amax >> 23) - 126;  // amax < 2^found
  return bits_as<float>((uint32_t)((found > least ? found : least) - bits + 127) << 23);
}

// Products<P, B>::block for the digits and bits of a case.
template <template <int, int> class Products>
static decltype(Path::block) digits_block(const HalGemm& a) {
  decltype(Path::block) block = nullptr;
  by_bits(a.w.s.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    const int digits = digits_of(a);
    block = digits == 1   ? Products<1, B>::block
            : digits == 3 ? Products<3, B>::block
                          : Products<4, B>::block;
  });
  return block;
}

}  // namespace
