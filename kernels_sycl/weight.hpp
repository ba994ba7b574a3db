// SPDX-License-Identifier: Apache-2.0
// A weight of HAL_BITS bits as rows of words (products.h), number by number.
#pragma once
#include "products.h"
#include "team.h"

namespace {

const int CHUNK = 32;  // columns

// Code i of a chunk.
HAL_INLINE int code_at(const uint32_t* words, int i) {
  const int word = i * HAL_BITS / 32, shift = i * HAL_BITS % 32;
  uint32_t x = words[word] >> shift;
  if (shift + HAL_BITS > 32) x |= words[word + 1] << (32 - shift);
  return (int)(x & ((1u << HAL_BITS) - 1));
}

HAL_INLINE float number_at(const void* p, int64_t i, int dtype) {
  if (dtype == HAL_F32) return ((const float*)p)[i];
  if (dtype == HAL_F16) return (float)((const sycl::half*)p)[i];
  return widened(((const uint16_t*)p)[i], HAL_BF16);
}

HAL_INLINE void put_number(void* p, int64_t i, int dtype, float x) {
  store_float(p, i, x, dtype);
}

// The grid of a group.
struct Steps {
  float scale, zero;
};

HAL_INLINE Steps steps_at(const HalProduct& a, int64_t row, int64_t k) {
  const int64_t group = row * a.s.groups + k / a.s.width;
  const float half = 1 << (HAL_BITS - 1);
  return {number_at(a.scale, group, a.s.scale_dtype), a.zero ? (float)a.zero[group] : half};
}

HAL_INLINE const uint32_t* words_at(const HalProduct& a, int64_t row, int64_t k) {
  return a.codes + (row * ((a.s.k + CHUNK - 1) / CHUNK) + k / CHUNK) * HAL_BITS;
}

// One number of the weight.
HAL_INLINE float weight_at(const HalProduct& a, int64_t row, int64_t k) {
  const Steps g = steps_at(a, row, k);
  return g.scale * ((float)code_at(words_at(a, row, k), (int)(k % CHUNK)) - g.zero);
}

}  // namespace
