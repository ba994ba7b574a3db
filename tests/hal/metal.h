// SPDX-License-Identifier: Apache-2.0
// What the shader of hal/backends/mps.py takes from Metal, for a host compiler. Says nothing of what
// Metal's own compiler makes of it.
#pragma once
#include "../../csrc/floats.h"

typedef unsigned int uint;
typedef unsigned char uchar;
struct uint2 {
  uint x, y;
};
struct uint3 {
  uint x, y, z;
};
struct half {
  uint16_t bits;
  explicit half(float x) : bits(to_f16(x)) {}
  operator float() const { return from_f16(bits); }
};
struct bfloat {
  uint16_t bits;
  explicit bfloat(float x) : bits(to_bf16(x)) {}
  operator float() const { return bits_as<float>((uint32_t)bits << 16); }
};

namespace metal {
inline int min(int a, int b) { return a < b ? a : b; }

// Lanes come one after the other, twice: first they hand in their numbers, then all get the sum.
inline float handed_in = 0;
inline bool counting = true;
inline float simd_sum(float x) {
  if (counting) handed_in += x;
  return handed_in;
}
}  // namespace metal

#define device
#define kernel inline
