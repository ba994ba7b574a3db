// SPDX-License-Identifier: Apache-2.0
// Float dtypes by their bits, for every compiler that builds the bodies of csrc: CPUs, nvcc, DPC++.
#pragma once
#include <stdint.h>

#include "hal_abi.h"

#ifdef __CUDACC__
#define HAL_INLINE static __device__ __forceinline__
#define HAL_VERB static __device__
#else
#define HAL_INLINE static inline __attribute__((always_inline))
#define HAL_MEMBER inline __attribute__((always_inline))
#define HAL_VERB static
#endif

namespace {

template <class To, class From>
HAL_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <int F>
struct Storage {
  typedef uint16_t type;
};
template <>
struct Storage<HAL_F32> {
  typedef float type;
};
template <int F>
using Stored = typename Storage<F>::type;

HAL_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  return x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Round half to even into 5 + 10 bits: subnormals by adding 0.5 (whose ulp is 2^-24), the rest by
// adding half an ulp to the bits; 65520 and more become infinity.
HAL_INLINE uint16_t to_f16(float x) {
  const uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (size < 0x38800000) {
    const float shifted = bits_as<float>(size) + 0.5f;
    return (uint16_t)(sign | (bits_as<uint32_t>(shifted) - 0x3f000000));
  }
  return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

HAL_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, size = h & 0x7fff;
  if (size >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (size & 0x3ff) << 13);
  const float x = bits_as<float>(size << 13) * bits_as<float>(0x77800000u);  // * 2^112
  return bits_as<float>(sign | bits_as<uint32_t>(x));
}

// Calls f with the dtype as a compile-time constant.
template <int F>
struct Float {
  static const int value = F;
};
template <class Fn>
HAL_INLINE void by_dtype(int dtype, Fn f) {
  if (dtype == HAL_F32) f(Float<HAL_F32>());
  else if (dtype == HAL_BF16) f(Float<HAL_BF16>());
  else f(Float<HAL_F16>());
}

}  // namespace
