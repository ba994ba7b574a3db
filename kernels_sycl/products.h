// SPDX-License-Identifier: Apache-2.0
// The border of the products: plain numbers and addresses, the same for the host and the device.
#pragma once
#include "hal_abi.h"

#define HAL_X_ROWS 4  // rows of x that share one pass over the weight

// x [m, k] times the rows of a weight, or the weight itself (`decode`: out [n, k]).
struct HalProduct {
  HalShape s;             // dtype: of x and out
  const uint32_t* codes;  // [n, k / 32 rounded up * bits]: a row is a stream of codes, lowest bits first
  const void* scale;      // [n, groups]
  const uint8_t* zero;    // [n, groups] or null
  const void* bias;       // [n] or null
  const void* x;
  void* out;
  int64_t m, blocks;       // blocks: how many teams share the rows of x
  int32_t bias_dtype, experts;  // experts: weights stacked along n
  const int32_t* offsets;  // [experts + 1], expert e has rows offsets[e] .. offsets[e + 1] of x; or null
};

// Codes of a weight [n, k], packed like that.
struct HalWords {
  HalShape s;
  uint8_t* codes;
  uint32_t* words;
  int64_t along, across;  // from a word of a row to its next, from a row to the next
};
