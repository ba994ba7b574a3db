// SPDX-License-Identifier: Apache-2.0
// Sums that tell one piece of memory from another (hal/digest.py): 2048 lanes, each a polynomial of
// every 2048th 32-bit word, modulo 2^64. Whether numbers are finite is seen on the way.
//
// Plain loops: compilers make vectors of them, and without AVX-512 there is no product of 64 bits.
#pragma once
#include "floats.h"

namespace {

const int64_t DIGEST_LANES = 2048;
const uint64_t DIGEST_FACTOR = 0x5851f42d4c957f2dull;

HAL_INLINE void digest_stripe(const uint8_t* data, uint64_t* sums) {
  for (int64_t i = 0; i < DIGEST_LANES; i++) {
    int32_t word;
    __builtin_memcpy(&word, data + 4 * i, 4);
    sums[i] = sums[i] * DIGEST_FACTOR + (uint64_t)(int64_t)word;
  }
}

// Whether all bits of `exponent` are set in any of n numbers.
template <class T>
HAL_INLINE bool any_with(const uint8_t* data, int64_t n, T exponent) {
  T found = 0;
  for (int64_t i = 0; i < n; i++) {
    T x;
    __builtin_memcpy(&x, data + (int64_t)sizeof(T) * i, sizeof(T));
    found |= (T)((x & exponent) == exponent);
  }
  return found;
}

HAL_INLINE bool any_not_finite(const uint8_t* data, int64_t bytes, int dtype) {
  switch (dtype) {
    case HAL_F32: return any_with<uint32_t>(data, bytes / 4, 0x7f800000);
    case HAL_BF16: return any_with<uint16_t>(data, bytes / 2, 0x7f80);
    case HAL_F16: return any_with<uint16_t>(data, bytes / 2, 0x7c00);
    default: return false;
  }
}

static void digest_bytes(const HalDigest* a) {
  const int64_t stripe = DIGEST_LANES * 4;
  uint8_t tail[DIGEST_LANES * 4];
  bool bad = false;
  for (int64_t at = 0; at < a->bytes; at += stripe) {
    const uint8_t* row = a->data + at;
    const int64_t left = a->bytes - at;
    if (left < stripe) {
      for (int64_t i = 0; i < stripe; i++) tail[i] = i < left ? row[i] : 0;
      row = tail;
    }
    bad |= any_not_finite(row, stripe, a->dtype);
    digest_stripe(row, a->sums);
  }
  *a->finite = !bad;
}

}  // namespace
