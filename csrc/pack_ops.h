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

HAL_INLINE uint64_t every_byte(int x) { return (uint64_t)x * 0x0101010101010101; }

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

// The same for a number of bits known to the compiler, in one instruction where there is one.
template <int B>
HAL_INLINE uint64_t joined(uint64_t x) {
#if HAL_LEVEL >= HAL_LEVEL_AVX2
  return _pext_u64(x, every_byte((1 << B) - 1));
#else
  return squeeze(x, B);
#endif
}

template <int B>
HAL_INLINE uint64_t apart(uint64_t x) {
#if HAL_LEVEL >= HAL_LEVEL_AVX2
  return _pdep_u64(x, every_byte((1 << B) - 1));
#else
  return spread(x, B);
#endif
}

// Calls f with the number of bits as a compile-time constant.
template <int B>
struct Bits {
  static const int value = B;
};
template <class Fn>
HAL_INLINE void by_bits(int bits, Fn f) {
  switch (bits) {
    case 2: return f(Bits<2>());
    case 3: return f(Bits<3>());
    case 4: return f(Bits<4>());
    case 5: return f(Bits<5>());
    case 6: return f(Bits<6>());
    case 7: return f(Bits<7>());
    default: return f(Bits<8>());
  }
}

// gptq and awq turn rows of codes into columns of words. 16 rows go through a buffer at a time, so
// that codes are read along their rows and words written in whole cache lines: one row after another
// took 0.85 ns a weight, most of it waiting for a new page at every step.
const int64_t ROWS = 16;

HAL_INLINE int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// ---- gptq: qweight [k / 32 * bits, n], each column a stream along k. One block = 32 columns of w.

template <int B>
HAL_INLINE void pack_gptq(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t n = a.s.n, k = a.s.k;
  for (int64_t row = 0; row < n; row += ROWS) {
    const int64_t rows = at_most(n - row, ROWS);
    for (int64_t b = block; b < end; b++) {
      uint32_t words[ROWS][10];  // the last 8 bytes of a row may reach past its B words
      for (int64_t r = 0; r < rows; r++) {
        const uint8_t* codes = a.codes + (row + r) * k + b * 32;
        for (int i = 0; i < 4; i++) {
          const uint64_t x = joined<B>(load_u64(codes + 8 * i));
          __builtin_memcpy((uint8_t*)words[r] + B * i, &x, 8);
        }
      }
      for (int i = 0; i < B; i++) {
        uint32_t* out = a.words + (b * B + i) * n + row;
        for (int64_t r = 0; r < rows; r++) out[r] = words[r][i];
      }
    }
  }
}

template <int B>
HAL_INLINE void unpack_gptq(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t n = a.s.n, k = a.s.k;
  for (int64_t row = 0; row < n; row += ROWS) {
    const int64_t rows = at_most(n - row, ROWS);
    for (int64_t b = block; b < end; b++) {
      uint32_t words[ROWS][10];
      for (int i = 0; i < B; i++) {
        const uint32_t* in = a.words + (b * B + i) * n + row;
        for (int64_t r = 0; r < rows; r++) words[r][i] = in[r];
      }
      for (int64_t r = 0; r < rows; r++) {
        for (int i = 0; i < 4; i++) {
          const uint64_t x = apart<B>(load_u64((const uint8_t*)words[r] + B * i));
          __builtin_memcpy(a.codes + (row + r) * k + b * 32 + 8 * i, &x, 8);
        }
      }
    }
  }
}

// ---- stream: words [n, k / 32 * bits], each row a stream along k. One block = 32 columns of w.

template <int B>
HAL_INLINE void pack_stream(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t k = a.s.k, bytes = 4 * B;
  for (int64_t row = 0; row < a.s.n; row++) {
    const uint8_t* codes = a.codes + row * k;
    uint8_t* out = (uint8_t*)a.words + row * (k / 32) * bytes;
    for (int64_t i = block * 4; i < end * 4; i++) {
      const uint64_t x = joined<B>(load_u64(codes + 8 * i));
      __builtin_memcpy(out + B * i, &x, B);
    }
  }
}

template <int B>
HAL_INLINE void unpack_stream(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t k = a.s.k, bytes = 4 * B;
  const uint8_t* last = (const uint8_t*)a.words + a.s.n * (k / 32) * bytes - 8;
  for (int64_t row = 0; row < a.s.n; row++) {
    uint8_t* codes = a.codes + row * k;
    const uint8_t* in = (const uint8_t*)a.words + row * (k / 32) * bytes;
    for (int64_t i = block * 4; i < end * 4; i++) {
      uint64_t x = 0;  // B bytes through memory and back are slow: read 8 where there are so many
      if (in + B * i <= last) {
        x = load_u64(in + B * i);
      } else {
        __builtin_memcpy(&x, in + B * i, B);
      }
      x = apart<B>(x);
      __builtin_memcpy(codes + 8 * i, &x, 8);
    }
  }
}

// ---- awq: qweight [k, n / 8], nibble i of a word holds row 0 2 4 6 1 3 5 7 of its 8: byte j holds
// rows AWQ_ROW[j] and AWQ_ROW[j] + 2.

const int AWQ_ROW[4] = {0, 4, 1, 5};

const int64_t COLUMNS = 64;  // a cache line of codes

// Words of n columns of 8 rows, the first of which starts at `codes`.
HAL_INLINE void awq_words(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words) {
  uint8_t bytes[4][COLUMNS];
  for (int j = 0; j < 4; j++) {
    const uint8_t *low = codes + AWQ_ROW[j] * k, *high = low + 2 * k;
    for (int64_t i = 0; i < n; i++) bytes[j][i] = (uint8_t)(low[i] | high[i] << 4);
  }
  for (int64_t i = 0; i < n; i++) {
    words[i] = bytes[0][i] | bytes[1][i] << 8 | bytes[2][i] << 16 | (uint32_t)bytes[3][i] << 24;
  }
}

HAL_INLINE void awq_codes(uint8_t* codes, int64_t k, int64_t n, const uint32_t* words) {
  for (int j = 0; j < 4; j++) {
    uint8_t *low = codes + AWQ_ROW[j] * k, *high = low + 2 * k;
    for (int64_t i = 0; i < n; i++) low[i] = (uint8_t)(words[i] >> 8 * j & 15);
    for (int64_t i = 0; i < n; i++) high[i] = (uint8_t)(words[i] >> (8 * j + 4) & 15);
  }
}

// Calls body(first word, words, first column, columns), at most 16 x 64.
template <class Body>
HAL_INLINE void each_awq_square(const HalRepack& a, int64_t block, int64_t end, Body body) {
  const int64_t words = a.s.n / 8, last = at_most(end * 32, a.s.k);
  for (int64_t w = 0; w < words; w += ROWS) {
    int64_t c = block * 32;
    for (; c + COLUMNS <= last; c += COLUMNS) body(w, at_most(words - w, ROWS), c, COLUMNS);
    if (c < last) body(w, at_most(words - w, ROWS), c, last - c);
  }
}

static void pack_awq(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t k = a.s.k;
  each_awq_square(a, block, end, [&](int64_t w, int64_t words, int64_t c, int64_t columns)
                                     __attribute__((always_inline)) {
    uint32_t t[ROWS][COLUMNS];
    for (int64_t i = 0; i < words; i++) {
      awq_words(a.codes + (w + i) * 8 * k + c, k, columns, t[i]);
    }
    for (int64_t i = 0; i < columns; i++) {
      uint32_t* out = a.words + (c + i) * (a.s.n / 8) + w;
      for (int64_t j = 0; j < words; j++) out[j] = t[j][i];
    }
  });
}

static void unpack_awq(const HalRepack& a, int64_t block, int64_t end) {
  const int64_t k = a.s.k;
  each_awq_square(a, block, end, [&](int64_t w, int64_t words, int64_t c, int64_t columns)
                                     __attribute__((always_inline)) {
    uint32_t t[ROWS][COLUMNS];
    for (int64_t i = 0; i < columns; i++) {
      const uint32_t* in = a.words + (c + i) * (a.s.n / 8) + w;
      for (int64_t j = 0; j < words; j++) t[j][i] = in[j];
    }
    for (int64_t i = 0; i < words; i++) {
      awq_codes(a.codes + (w + i) * 8 * k + c, k, columns, t[i]);
    }
  });
}

static void pack_blocks(const HalRepack* a, int64_t block, int64_t end) {
  if (a->layout == HAL_AWQ) return pack_awq(*a, block, end);
  by_bits(a->s.bits, [&](auto bits) {
    const int B = decltype(bits)::value;
    a->layout == HAL_GPTQ ? pack_gptq<B>(*a, block, end) : pack_stream<B>(*a, block, end);
  });
}

static void unpack_blocks(const HalRepack* a, int64_t block, int64_t end) {
  if (a->layout == HAL_AWQ) return unpack_awq(*a, block, end);
  by_bits(a->s.bits, [&](auto bits) {
    const int B = decltype(bits)::value;
    a->layout == HAL_GPTQ ? unpack_gptq<B>(*a, block, end) : unpack_stream<B>(*a, block, end);
  });
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

HAL_INLINE int64_t step_bytes(int bits) { return 64 * bits; }

HAL_INLINE uint8_t* tile_codes(const HalTiles& t, int64_t tile, int64_t k) {
  return t.codes + (tile * t.kp + k) / 8 * step_bytes(t.s.bits);
}

// A step is 64 rows x 8 inputs in eight pieces of 64 codes: piece 2v + h holds inputs 4h .. 4h + 3 of rows
// 16v .. 16v + 15, code 4c + j that of input 4h + j and row 16v + c. Where B bits divide a byte, the bytes
// of 64 hold 8 / B pieces, the first lowest, and one `and` gives four inputs of every row; other widths
// have one dense stream of bits after the other.
template <int B>
struct Piece {
  static const bool fields = 8 % B == 0;
  static int bytes(int piece) { return fields ? piece / (8 / B) * 64 : piece * 8 * B; }
  static int shift(int piece) { return fields ? piece % (8 / B) * B : 0; }
};

// Two rows (2 pair, 2 pair + 1 of block v) at a time: a and b hold their 8 codes, one a byte. Two blocks
// share bytes in 2 bits; the even one is put first.
template <int B>
HAL_INLINE void put_rows(uint8_t* step, int v, int pair, uint64_t a, uint64_t b) {
  const uint64_t halves[2] = {(a & 0xffffffff) | b << 32, a >> 32 | (b >> 32 << 32)};
  if (B == 2 || B == 4) {
    uint8_t* out = step + Piece<B>::bytes(2 * v) + 8 * pair;
    uint64_t x = (halves[0] | halves[1] << B) << Piece<B>::shift(2 * v);
    if (Piece<B>::shift(2 * v)) x |= load_u64(out);
    __builtin_memcpy(out, &x, 8);
    return;
  }
  for (int h = 0; h < 2; h++) {
    const uint64_t x = joined<B>(halves[h]);
    __builtin_memcpy(step + Piece<B>::bytes(2 * v + h) + pair * B, &x, B);
  }
}

template <int B>
HAL_INLINE void get_rows(const uint8_t* step, int v, int pair, uint64_t* a, uint64_t* b) {
  uint64_t x[2] = {};
  for (int h = 0; h < 2; h++) {
    if (B == 2 || B == 4) {
      x[h] = load_u64(step + Piece<B>::bytes(2 * v) + 8 * pair) >> Piece<B>::shift(2 * v + h);
      x[h] &= every_byte((1 << B) - 1);
    } else {
      // B bytes through memory and back are slow: 8, of which the last piece of a step has some before.
      const uint8_t* in = step + Piece<B>::bytes(2 * v + h) + pair * B;
      x[h] = apart<B>(2 * v + h < 7 ? load_u64(in) : load_u64(in - (8 - B)) >> 8 * (8 - B));
    }
  }
  *a = (x[0] & 0xffffffff) | x[1] << 32;
  *b = x[0] >> 32 | (x[1] >> 32 << 32);
}

HAL_INLINE uint64_t codes_at(const uint8_t* p, int64_t n) {
  uint64_t x = 0;
  if (n >= 8) return load_u64(p);
  for (int64_t i = 0; i < n; i++) x |= (uint64_t)p[i] << 8 * i;
  return x;
}

HAL_INLINE void put_codes(uint8_t* p, int64_t n, uint64_t x) {
  if (n >= 8) {
    __builtin_memcpy(p, &x, 8);
    return;
  }
  for (int64_t i = 0; i < n; i++) p[i] = (uint8_t)(x >> 8 * i);
}

// Calls body(step, block, pair of rows in it, code of the first, code of the second, inputs); codes are
// null past the last row. A pair of rows is followed along its inputs: 16 rows side by side are
// multiples of 4 KB apart as a rule, more than the sets of L1 hold.
template <int B, class Body>
HAL_INLINE void each_pair(const HalTiles& t, const HalPlain& p, int64_t tile, Body body) {
  for (int64_t r = 0; r < TILE; r += 2) {
    const int64_t row = tile * TILE + r;
    uint8_t* first = row < t.s.n ? p.codes + row * t.s.k : nullptr;
    uint8_t* second = row + 1 < t.s.n ? first + t.s.k : nullptr;
    for (int64_t g = 0; g < t.s.groups; g++) {
      const int64_t inputs = group_inputs(t.s, g), k = g * t.s.width;
      uint8_t* step = tile_codes(t, tile, group_start(t.s, g));
      for (int64_t i = 0; i < inputs; i += 8, step += step_bytes(B)) {
        body(step, (int)(r / 16), (int)(r % 16 / 2), first ? first + k + i : nullptr,
             second ? second + k + i : nullptr, inputs - i);
      }
    }
  }
}

template <class T>
HAL_INLINE void copy_columns(const HalTiles& t, T* tiled, T* plain, int64_t tile, bool to_tiles) {
  const int64_t groups = t.s.groups, left = t.s.n - tile * TILE;
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t c = 0; c < TILE && c < left; c++) {
      T* a = tiled + (tile * groups + g) * TILE + c;
      T* b = plain + (tile * TILE + c) * groups + g;
      if (to_tiles) *a = *b;
      else *b = *a;
    }
  }
}

HAL_INLINE void copy_scales(const HalTiles& t, const HalPlain& p, int64_t tile, bool to_tiles) {
  if (t.s.scale_dtype == HAL_F32) {
    copy_columns(t, (uint32_t*)t.scale, (uint32_t*)p.scale, tile, to_tiles);
  } else {
    copy_columns(t, (uint16_t*)t.scale, (uint16_t*)p.scale, tile, to_tiles);
  }
  if (t.zero) copy_columns(t, t.zero, p.zero, tile, to_tiles);
}

static void tile_tiles(const HalTiles* t, const HalPlain* p, int64_t tile, int64_t end) {
  by_bits(t->s.bits, [&](auto bits) __attribute__((always_inline)) {
    constexpr int B = decltype(bits)::value;
    for (int64_t i = tile; i < end; i++) {
      each_pair<B>(*t, *p, i, [](uint8_t* step, int v, int pair, uint8_t* a, uint8_t* b, int64_t n)
                                  __attribute__((always_inline)) {
        put_rows<B>(step, v, pair, a ? codes_at(a, n) : 0, b ? codes_at(b, n) : 0);
      });
      copy_scales(*t, *p, i, true);
    }
  });
}

static void untile_tiles(const HalTiles* t, const HalPlain* p, int64_t tile, int64_t end) {
  by_bits(t->s.bits, [&](auto bits) __attribute__((always_inline)) {
    constexpr int B = decltype(bits)::value;
    for (int64_t i = tile; i < end; i++) {
      each_pair<B>(*t, *p, i, [](uint8_t* step, int v, int pair, uint8_t* a, uint8_t* b, int64_t n)
                                  __attribute__((always_inline)) {
        uint64_t x, y;
        get_rows<B>(step, v, pair, &x, &y);
        if (a) put_codes(a, n, x);
        if (b) put_codes(b, n, y);
      });
      copy_scales(*t, *p, i, false);
    }
  });
}

}  // namespace
