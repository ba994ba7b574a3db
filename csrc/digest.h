// SPDX-License-Identifier: Apache-2.0
// Sums that tell one piece of memory from another (hal/digest.py): 2048 lanes, each a polynomial of
// every 2048th 32-bit word, modulo 2^64.
#pragma once
#include <stdint.h>
#include <string.h>

namespace hal {

const int64_t DIGEST_LANES = 2048;
const uint64_t DIGEST_FACTOR = 0x5851f42d4c957f2dull;

inline void digest(const uint8_t* data, int64_t bytes, uint64_t* sums) {
  const int64_t stripe = DIGEST_LANES * 4;
  uint8_t tail[stripe];
  for (int64_t at = 0; at < bytes; at += stripe) {
    const uint8_t* row = data + at;
    if (bytes - at < stripe) {
      memset(tail, 0, sizeof(tail));
      memcpy(tail, row, static_cast<size_t>(bytes - at));
      row = tail;
    }
    for (int64_t i = 0; i < DIGEST_LANES; i++) {
      int32_t word;
      memcpy(&word, row + 4 * i, 4);
      sums[i] = sums[i] * DIGEST_FACTOR + static_cast<uint64_t>(static_cast<int64_t>(word));
    }
  }
}

}  // namespace hal
