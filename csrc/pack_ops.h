// SPDX-License-Identifier: Apache-2.0
// Codes to file layouts and to the tile layout, and back. Everything rests on one pair: 8 codes of
// B bits <-> B bytes, least significant bit first (32 codes are then B words, formats.md 0.4).
// These shifts are plain 64-bit arithmetic: a layer is packed once, and 8 codes at a time is enough.
#pragma once
#include "vec.h"

namespace {

HAL_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t x;
  __builtin_memcpy(&x, p, 8);
  return x;
}

// 8 codes, one a byte, to 8 * bits consecutive bits.
HAL_INLINE uint64_t squeeze(uint64_t x, int bits) {
  x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - bits);
  x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * bits);
  return (x & 0xffffffff) | x >> 32 << (4 * bits);
}

// The inverse: bits above 8 * bits are ignored.
HAL_INLINE uint64_t spread(uint64_t x, int bits) {
  const uint64_t b1 = (1ull << bits) - 1, b2 = (1ull << 2 * bits) - 1, b4 = (1ull << 4 * bits) - 1;
  x = (x & b4) | (x >> 4 * bits & b4) << 32;
  x = (x & (b2 | b2 << 32)) | (x & (b2 | b2 << 32) << 2 * bits) << (16 - 2 * bits);
  const uint64_t low = b1 * 0x0001000100010001;
  return (x & low) | (x & low << bits) << (8 - bits);
}

// ---- gptq: qweight [k / 32 * bits, n], each column a stream along k. One block = 32 columns of w.

static void pack_gptq(const HalRepack* a, int64_t block, int64_t end) {
  const int bits = a->s.bits;
  const int64_t n = a->s.n, k = a->s.k;
  for (int64_t b = block; b < end; b++) {
    for (int64_t r = 0; r < n; r++) {
      const uint8_t* codes = a->codes + r * k + b * 32;
      uint8_t bytes[40];
      for (int i = 0; i < 4; i++) {
        const uint64_t x = squeeze(load_u64(codes + 8 * i), bits);
        __builtin_memcpy(bytes + bits * i, &x, 8);
      }
      for (int i = 0; i < bits; i++) {
        __builtin_memcpy(a->words + (b * bits + i) * n + r, bytes + 4 * i, 4);
      }
    }
  }
}

static void unpack_gptq(const HalRepack* a, int64_t block, int64_t end) {
  const int bits = a->s.bits;
  const int64_t n = a->s.n, k = a->s.k;
  for (int64_t b = block; b < end; b++) {
    for (int64_t r = 0; r < n; r++) {
      uint8_t bytes[40];
      for (int i = 0; i < bits; i++) {
        __builtin_memcpy(bytes + 4 * i, a->words + (b * bits + i) * n + r, 4);
      }
      for (int i = 0; i < 4; i++) {
        const uint64_t x = spread(load_u64(bytes + bits * i), bits);
        __builtin_memcpy(a->codes + r * k + b * 32 + 8 * i, &x, 8);
      }
    }
  }
}

// ---- awq: qweight [k, n / 8], nibble i of a word holds column order[i] of its 8.

HAL_INLINE int awq_column(int i) { return i < 4 ? 2 * i : 2 * i - 7; }

static void pack_awq(const HalRepack* a, int64_t block, int64_t end) {
  const int64_t words = a->s.n / 8, k = a->s.k;
  for (int64_t w = 0; w < words; w++) {
    for (int64_t c = block * 32; c < end * 32 && c < k; c++) {
      uint32_t word = 0;
      for (int i = 0; i < 8; i++) {
        word |= (uint32_t)a->codes[(w * 8 + awq_column(i)) * k + c] << 4 * i;
      }
      a->words[c * words + w] = word;
    }
  }
}

static void unpack_awq(const HalRepack* a, int64_t block, int64_t end) {
  const int64_t words = a->s.n / 8, k = a->s.k;
  for (int64_t w = 0; w < words; w++) {
    for (int64_t c = block * 32; c < end * 32 && c < k; c++) {
      const uint32_t word = a->words[c * words + w];
      for (int i = 0; i < 8; i++) {
        a->codes[(w * 8 + awq_column(i)) * k + c] = (uint8_t)(word >> 4 * i & 15);
      }
    }
  }
}

static void pack_blocks(const HalRepack* a, int64_t block, int64_t end) {
  if (a->layout == HAL_AWQ) pack_awq(a, block, end);
  else pack_gptq(a, block, end);
}

static void unpack_blocks(const HalRepack* a, int64_t block, int64_t end) {
  if (a->layout == HAL_AWQ) unpack_awq(a, block, end);
  else unpack_gptq(a, block, end);
}

// ---- tiles (csrc/README.md): 64 rows of w; each step of 8 inputs holds four blocks of 16 rows.

const int64_t TILE = 64;

// Inputs of group g, padded to a multiple of 8.
HAL_INLINE int64_t group_inputs(const HalShape& s, int64_t g) {
  const int64_t left = s.k - g * s.width;
  return left < s.width ? left : s.width;
}
HAL_INLINE int64_t padded(int64_t n) { return (n + 7) & ~(int64_t)7; }

// First padded input of group g.
HAL_INLINE int64_t group_start(const HalShape& s, int64_t g) { return g * padded(s.width); }

HAL_INLINE int64_t block_bytes(int bits) { return 16 * bits; }

HAL_INLINE uint8_t* tile_codes(const HalTiles& t, int64_t tile, int64_t k) {
  return t.codes + (tile * t.kp + k) / 8 * 4 * block_bytes(t.s.bits);
}

// 16 rows x 8 inputs. Four bits: byte 4c + j = inputs j and 4 + j of row c, so that one `and` gives
// four inputs of every row. Other widths: per half of four inputs, the 64 codes 4c + j as a stream.
HAL_INLINE void put_block(uint8_t* out, const uint8_t* codes, int bits) {
  if (bits == 4) {
    for (int i = 0; i < 64; i++) {
      out[i] = (uint8_t)(codes[i / 4 * 8 + i % 4] | codes[i / 4 * 8 + i % 4 + 4] << 4);
    }
    return;
  }
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 8; i++) {
      uint8_t pair[8];
      __builtin_memcpy(pair, codes + 16 * i + 4 * half, 4);
      __builtin_memcpy(pair + 4, codes + 16 * i + 8 + 4 * half, 4);
      const uint64_t x = squeeze(load_u64(pair), bits);
      __builtin_memcpy(out + (8 * half + i) * bits, &x, bits);
    }
  }
}

HAL_INLINE void get_block(const uint8_t* in, uint8_t* codes, int bits) {
  if (bits == 4) {
    for (int i = 0; i < 64; i++) {
      codes[i / 4 * 8 + i % 4] = in[i] & 15;
      codes[i / 4 * 8 + i % 4 + 4] = in[i] >> 4;
    }
    return;
  }
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 8; i++) {
      uint64_t x = 0;
      __builtin_memcpy(&x, in + (8 * half + i) * bits, bits);
      x = spread(x, bits);
      __builtin_memcpy(codes + 16 * i + 4 * half, &x, 4);
      const uint32_t second = (uint32_t)(x >> 32);
      __builtin_memcpy(codes + 16 * i + 8 + 4 * half, &second, 4);
    }
  }
}

// Calls body(block, row of w, column of w, rows, inputs) for every block of a tile that has any.
template <class Body>
HAL_INLINE void each_block(const HalTiles& t, int64_t tile, Body body) {
  for (int64_t g = 0; g < t.s.groups; g++) {
    const int64_t inputs = group_inputs(t.s, g);
    for (int64_t i = 0; i < inputs; i += 8) {
      uint8_t* codes = tile_codes(t, tile, group_start(t.s, g) + i);
      for (int64_t v = 0; v < 4; v++) {
        const int64_t row = tile * TILE + 16 * v, left = t.s.n - row, more = inputs - i;
        body(codes + v * block_bytes(t.s.bits), row, g * t.s.width + i, left < 16 ? left : 16,
             more < 8 ? more : 8);
      }
    }
  }
}

HAL_INLINE void copy_scales(const HalTiles& t, const HalPlain& p, int64_t tile, bool to_tiles) {
  const int64_t size = t.s.scale_dtype == HAL_F32 ? 4 : 2, groups = t.s.groups;
  for (int64_t c = 0; c < TILE && tile * TILE + c < t.s.n; c++) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t plain = (tile * TILE + c) * groups + g, tiled = (tile * groups + g) * TILE + c;
      uint8_t *a = (uint8_t*)t.scale + tiled * size, *b = (uint8_t*)p.scale + plain * size;
      for (int64_t i = 0; i < size; i++) *(to_tiles ? a + i : b + i) = *(to_tiles ? b + i : a + i);
      if (t.zero) *(to_tiles ? t.zero + tiled : p.zero + plain) =
          *(to_tiles ? p.zero + plain : t.zero + tiled);
    }
  }
}

static void tile_tiles(const HalTiles* t, const HalPlain* p, int64_t tile, int64_t end) {
  for (int64_t i = tile; i < end; i++) {
    each_block(*t, i, [&](uint8_t* block, int64_t row, int64_t k, int64_t rows, int64_t inputs) {
      uint8_t codes[128] = {};
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < inputs; c++) codes[8 * r + c] = p->codes[(row + r) * t->s.k + k + c];
      }
      put_block(block, codes, t->s.bits);
    });
    copy_scales(*t, *p, i, true);
  }
}

static void untile_tiles(const HalTiles* t, const HalPlain* p, int64_t tile, int64_t end) {
  for (int64_t i = tile; i < end; i++) {
    each_block(*t, i, [&](uint8_t* block, int64_t row, int64_t k, int64_t rows, int64_t inputs) {
      uint8_t codes[128];
      get_block(block, codes, t->s.bits);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < inputs; c++) p->codes[(row + r) * t->s.k + k + c] = codes[8 * r + c];
      }
    });
    copy_scales(*t, *p, i, false);
  }
}

}  // namespace
