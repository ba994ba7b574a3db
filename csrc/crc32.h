// SPDX-License-Identifier: Apache-2.0
// CRC-32 of zip and zlib, folded by carry-less products: 64 bytes at a time are multiplied past the next
// 64, until 16 are left that have the same remainder (Gopal et al., Intel 2009).
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hal {

const uint32_t CRC_POLYNOMIAL = 0xedb88320;  // bits reversed: x^31 is the lowest

// One byte at a time, without the inversions at both ends.
inline uint32_t crc32_bytes(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i++) {
    crc ^= data[i];
    for (int b = 0; b < 8; b++) crc = crc >> 1 ^ (crc & 1 ? CRC_POLYNOMIAL : 0);
  }
  return crc;
}

#if defined(__x86_64__)

// x^n modulo the polynomial, shifted as a product of two reversed numbers wants it.
constexpr uint64_t crc_power(int n) {
  uint32_t x = 0x80000000;
  for (int i = 0; i < n; i++) x = x >> 1 ^ (x & 1 ? CRC_POLYNOMIAL : 0);
  return (uint64_t)x << 1;
}

inline bool crc32_folds() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }

// `x` moved past `Bits` bits, plus what stands there.
template <int Bits>
__attribute__((target("pclmul,sse4.1"))) inline __m128i crc_folded(__m128i x, __m128i next) {
  constexpr uint64_t low = crc_power(Bits + 32), high = crc_power(Bits - 32);
  const __m128i by = _mm_set_epi64x((int64_t)high, (int64_t)low);
  const __m128i a = _mm_clmulepi64_si128(x, by, 0x00), b = _mm_clmulepi64_si128(x, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(a, b), next);
}

// The sum of `bytes` that follow others, whose sum is `before`.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32(uint32_t before, const uint8_t* data,
                                                               int64_t bytes) {
  if (bytes < 64) return ~crc32_bytes(~before, data, bytes);
  const auto at = [&](int64_t i) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_loadu_si128((const __m128i*)(data + i));
  };
  __m128i x[4];
  for (int j = 0; j < 4; j++) x[j] = at(16 * j);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)~before));
  int64_t i = 64;
  for (; i + 64 <= bytes; i += 64) {
    for (int j = 0; j < 4; j++) x[j] = crc_folded<512>(x[j], at(i + 16 * j));
  }
  __m128i one = x[0];
  for (int j = 1; j < 4; j++) one = crc_folded<128>(one, x[j]);
  for (; i + 16 <= bytes; i += 16) one = crc_folded<128>(one, at(i));
  uint8_t left[16];
  _mm_storeu_si128((__m128i*)left, one);
  return ~crc32_bytes(crc32_bytes(0, left, 16), data + i, bytes - i);
}

#else

inline bool crc32_folds() { return false; }
inline uint32_t crc32(uint32_t before, const uint8_t* data, int64_t bytes) {
  return ~crc32_bytes(~before, data, bytes);
}

#endif

}  // namespace hal
