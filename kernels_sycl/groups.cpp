// SPDX-License-Identifier: Apache-2.0
// The group-wise verbs: csrc/group_ops.h, round_ops.h. And codes to the words of file layouts, and back.
#include "device.hpp"
#include "round_ops.h"
#include "products.h"

// Every team has `per` groups in a row.
#define HAL_GROUPS(name, Args, body)                                         \
  HAL_KERNEL hal_##name(Args a, int per) {                                   \
    const int64_t from = team_index() * per, count = a.s.n * a.s.groups;     \
    if (from < count) body(&a, from, from + per < count ? from + per : count); \
  }

HAL_GROUPS(search, HalSearch, search_groups)
HAL_GROUPS(qdq, HalQdq, qdq_groups)
HAL_GROUPS(qdq_step, HalStep, step_groups)
HAL_GROUPS(quantize, HalPlain, quantize_groups)
HAL_GROUPS(dequantize, HalPlain, dequantize_groups)
HAL_GROUPS(quantize_act, HalAct, quantize_act_groups)
HAL_GROUPS(round, HalRound, round_groups)

// A work-item to every 32 codes of a weight: `bits` words.
HAL_KERNEL hal_pack(HalWords a) {
  const int64_t chunks = a.s.k / 32, row = item_index() / chunks, chunk = item_index() % chunks;
  if (row >= a.s.n) return;
  const uint8_t* codes = a.codes + row * a.s.k + chunk * 32;
  uint32_t* words = a.words + row * a.across + chunk * a.s.bits * a.along;
  uint64_t held = 0;
  for (int i = 0, bits = 0; i < 32; i++) {
    held |= (uint64_t)codes[i] << bits;
    bits += a.s.bits;
    if (bits < 32) continue;
    *words = (uint32_t)held;
    words += a.along;
    held >>= 32;
    bits -= 32;
  }
}

HAL_KERNEL hal_unpack(HalWords a) {
  const int64_t chunks = a.s.k / 32, row = item_index() / chunks, chunk = item_index() % chunks;
  if (row >= a.s.n) return;
  uint8_t* codes = a.codes + row * a.s.k + chunk * 32;
  const uint32_t* words = a.words + row * a.across + chunk * a.s.bits * a.along;
  uint64_t held = 0;
  for (int i = 0, bits = 0; i < 32; i++) {
    if (bits < a.s.bits) {
      held |= (uint64_t)*words << bits;
      words += a.along;
      bits += 32;
    }
    codes[i] = (uint8_t)(held & ((1u << a.s.bits) - 1));
    held >>= a.s.bits;
    bits -= a.s.bits;
  }
}

// A work-item to every word of AWQ: 4 bits, nibble i of word [column, w] is row 8 w + ORDER[i].
const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

HAL_KERNEL hal_pack_awq(HalWords a) {
  const int64_t column = item_index() % a.s.k, first = item_index() / a.s.k * 8;
  if (first >= a.s.n) return;
  uint32_t word = 0;
  for (int i = 0; i < 8; i++) {
    word |= (uint32_t)a.codes[(first + ORDER[i]) * a.s.k + column] << 4 * i;
  }
  a.words[column * a.along + first / 8 * a.across] = word;
}

HAL_KERNEL hal_unpack_awq(HalWords a) {
  const int64_t column = item_index() % a.s.k, first = item_index() / a.s.k * 8;
  if (first >= a.s.n) return;
  const uint32_t word = a.words[column * a.along + first / 8 * a.across];
  for (int i = 0; i < 8; i++) {
    a.codes[(first + ORDER[i]) * a.s.k + column] = (uint8_t)(word >> 4 * i & 15);
  }
}
