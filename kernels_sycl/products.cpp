// SPDX-License-Identifier: Apache-2.0
// Products of a few rows of dtype HAL_FLOAT with a weight of HAL_BITS bits, and that weight decoded. A
// team of sixteen takes a row of the weight, a work-item 32 of its columns at a time: HAL_BITS words.
#include "device.hpp"
#include "weight.hpp"

namespace {

const int ROWS = HAL_X_ROWS;

// Adds the products of `rows` rows of x with a whole chunk that lies in one group.
HAL_INLINE void add_chunk(const HalProduct& a, int64_t row, int64_t k, int64_t x_row, int rows,
                          float* sums) {
  const uint32_t* words = words_at(a, row, k);
  const Steps g = steps_at(a, row, k);
  uint32_t own[HAL_BITS];
  for (int i = 0; i < HAL_BITS; i++) own[i] = words[i];
  float level[CHUNK];
#pragma unroll
  for (int i = 0; i < CHUNK; i++) level[i] = (float)code_at(own, i) - g.zero;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r < rows) {
      const int64_t at = (x_row + r) * a.s.k + k;
      float dot = 0;
#pragma unroll
      for (int i = 0; i < CHUNK; i++) dot = fmaf(level[i], number_at(a.x, at + i, HAL_FLOAT), dot);
      sums[r] = fmaf(g.scale, dot, sums[r]);
    }
  }
}

// The same for any `count` columns.
HAL_INLINE void add_columns(const HalProduct& a, int64_t row, int64_t k, int count, int64_t x_row,
                            int rows, float* sums) {
  for (int i = 0; i < count; i++) {
    const float w = weight_at(a, row, k + i);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r < rows) sums[r] += w * number_at(a.x, (x_row + r) * a.s.k + k + i, HAL_FLOAT);
    }
  }
}

// Rows x_row .. x_row + rows of x times a row of the weight; out has `stride` columns.
HAL_INLINE void product_row(const HalProduct& a, int64_t row, int64_t x_row, int rows,
                            int64_t column, int64_t stride) {
  const bool whole = a.s.width % CHUNK == 0 || a.s.groups == 1;
  float sums[ROWS] = {};
  for (int64_t k = team_lane() * CHUNK; k < a.s.k; k += 16 * CHUNK) {
    const int count = (int)(a.s.k - k < CHUNK ? a.s.k - k : CHUNK);
    if (whole && count == CHUNK) add_chunk(a, row, k, x_row, rows, sums);
    else add_columns(a, row, k, count, x_row, rows, sums);
  }
  const float bias = a.bias ? number_at(a.bias, row, a.bias_dtype) : 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = fold(set1(sums[r])) + bias;
    if (r < rows && team_lane() == r) put_number(a.out, (x_row + r) * stride + column, HAL_FLOAT, sum);
  }
}

}  // namespace

// `blocks` teams to every row of the weight; they share the rows of x that are its own, ROWS at a time.
HAL_KERNEL hal_product(HalProduct a) {
  const int64_t team = team_index(), row = team % a.s.n, block = team / a.s.n;
  const int64_t rows = a.s.n / a.experts, expert = row / rows;
  const int64_t end = a.offsets ? a.offsets[expert + 1] : a.m;
  int64_t m = (a.offsets ? a.offsets[expert] : 0) + block * ROWS;
  if (block >= a.blocks) return;
  for (; m < end; m += a.blocks * ROWS) {
    const int few = (int)(end - m < ROWS ? end - m : ROWS);
    product_row(a, row, m, few, row % rows, rows);
  }
}

// A work-item to every number of the weight.
HAL_KERNEL hal_decode(HalProduct a) {
  const int64_t i = item_index();
  if (i < a.s.n * a.s.k) put_number(a.out, i, HAL_FLOAT, weight_at(a, i / a.s.k, i % a.s.k));
}
