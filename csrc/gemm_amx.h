// SPDX-License-Identifier: Apache-2.0
// AMX: 16 rows of x times 32 inputs times 16 columns in one instruction.
#pragma once
#include "gemm_bf16.h"

namespace {

// The decoded chunk is already in
// its operand order. tmm0-3: sums of 16 x 64; tmm4: x; tmm5, 6: weights, in turn.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In memory of its own: GCC 12 takes _tile_loadconfig to read 8 bytes only, and drops the others.
const TileConfig TILE_CONFIG;

static void begin_amx() { _tile_loadconfig(&TILE_CONFIG); }

static void end_amx() { _tile_release(); }

HAL_INLINE void multiply_amx(const uint16_t* x, const __m512i* t, int64_t inputs, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += 32, t += 64, x += 512) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, t, 256);
    _tile_loadd(6, t + 1, 256);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, t + 2, 256);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(6, t + 3, 256);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, out, 256);
  _tile_stored(1, out + 16, 256);
  _tile_stored(2, out + 32, 256);
  _tile_stored(3, out + 48, 256);
}

// Sums of 16 rows in memory that are not scaled yet: a load right behind a tile store waits for it, so
// every block is added while the next one is multiplied.
struct Pending {
  alignas(64) float acc[2][16 * TILE];
  int now = 0;
  int64_t row = 0, rows = 0, g = 0;
  bool last = false;  // takes the zero points off
};

static void add_pending(const HalGemm& a, int64_t tile, int64_t first, const Pending& p,
                        float* sums) {
  if (!p.rows) return;
  const Columns columns = columns_of(a.w, tile, p.g);
  const float* xsum = a.w.zero && p.last ? group_sums<PanelX>(a) + p.g : nullptr;
  for (int64_t r = 0; r < p.rows; r++) {
    vf own[4];
    for (int v = 0; v < 4; v++) own[v] = load<HAL_F32>(p.acc[p.now ^ 1] + r * TILE + 16 * v);
    const float* of_row = xsum ? xsum + (p.row + r) * a.w.s.groups : nullptr;
    add_scaled(columns, of_row, own, sums + (p.row + r - first) * TILE);
  }
}

// The block in acc[now] becomes the pending one, after the one before it was added.
HAL_INLINE void push(const HalGemm& a, int64_t tile, int64_t first, int64_t row, int64_t rows,
                     int64_t g, bool last, float* sums, Pending& p) {
  add_pending(a, tile, first, p, sums);
  p.row = row;
  p.rows = rows;
  p.g = g;
  p.last = last;
  p.now ^= 1;
}

static void block_amx(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  Pending pending;
  each_chunk(w, tile, [&](int64_t g, int64_t i, int64_t n, const __m512i* t, bool last) {
    for (int p = 0; p < PanelX::pieces(a); p++) {
      for (int64_t m = 0; m < rows; m += 16) {
        const uint16_t* x = piece<PanelX>(a, p) + PanelX::at(w, row + m, g, i);
        multiply_amx(x, t, n, pending.acc[pending.now]);
        const int64_t some = rows - m < 16 ? rows - m : 16;
        push(a, tile, row, row + m, some, g, last && p == 0, sums, pending);
      }
    }
  });
  add_pending(a, tile, row, pending, sums);
}

// Up to 16 rows: decoding is most of the work. 32 inputs of four tiles are decoded by the vector
// units while the matrix unit multiplies the 32 before them. Codes wider than five bits are two
// nibbles with a table each, multiplied one after the other.
template <int B>
HAL_INLINE void decode_amx(const uint8_t* in, int64_t inputs, __m512i low, __m512i high,
                           const Unpack& u, __m512i* t) {
  for (int64_t k = 0; k < inputs; k += 8, in += 64 * B, t += 4) {
    prefetch_step<B>(in);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512i* out = t + 16 * v;
      if (B == 4) {
        const __m512i c = _mm512_loadu_si512(in + 64 * v);
        out[0] = _mm512_permutexvar_epi16(c, low);
        out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 4), low);
        out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 8), low);
        out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 12), low);
        continue;
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m512i c = unpack(u, in + (2 * v + h) * 8 * B);
        out[h] = _mm512_permutexvar_epi16(c, low);
        out[2 + h] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 8), low);
        if (B <= 5) continue;
        out[64 + h] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 4), high);
        out[66 + h] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 12), high);
      }
    }
  }
}

HAL_INLINE void multiply_decoded(const __m512i* t, int pieces) {
  _tile_loadd(7, t, 64);
  _tile_dpbf16ps(0, 4, 7);
  if (pieces > 1) _tile_dpbf16ps(0, 5, 7);
  if (pieces > 2) _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(7, t + 16, 64);
  _tile_dpbf16ps(1, 4, 7);
  if (pieces > 1) _tile_dpbf16ps(1, 5, 7);
  if (pieces > 2) _tile_dpbf16ps(1, 6, 7);
  _tile_loadd(7, t + 32, 64);
  _tile_dpbf16ps(2, 4, 7);
  if (pieces > 1) _tile_dpbf16ps(2, 5, 7);
  if (pieces > 2) _tile_dpbf16ps(2, 6, 7);
  _tile_loadd(7, t + 48, 64);
  _tile_dpbf16ps(3, 4, 7);
  if (pieces > 1) _tile_dpbf16ps(3, 5, 7);
  if (pieces > 2) _tile_dpbf16ps(3, 6, 7);
}

template <int B>
static void few_amx(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  const bool two = B > 5;
  const __m512i low = two ? nibble_table(1, 0) : small_table(w);
  const __m512i high = nibble_table(16, w.zero ? 0 : 1 << (B - 1));
  const Unpack u = unpack_of(B);
  const int pieces = PanelX::pieces(a);
  const uint8_t* in = tile_codes(w, tile, 0);
  Pending pending;
  TileConfig config;
  for (int i = 0; i < 7; i++) config.rows[i] = (uint8_t)rows;
  _tile_loadconfig(&config);
  // Rows past a group's last input keep older numbers, and meet zeros in x.
  const int64_t half = two ? 128 : 64;
  __m512i t[2 * 128] = {};
  int now = 0;
  const auto inputs_of = [&](int64_t g) { return g < w.s.groups ? padded(group_inputs(w.s, g)) : 0; };
  const auto decode = [&](int64_t inputs, int to) __attribute__((always_inline)) {
    decode_amx<B>(in, inputs, low, high, u, t + to * half);
    in += inputs * 8 * B;
  };
  const auto at_most_32 = [](int64_t n) { return n < 32 ? n : 32; };
  decode(at_most_32(inputs_of(0)), 0);
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = inputs_of(g);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < inputs; i += 32) {
      const int64_t at = PanelX::at(w, row, g, i);
      _tile_loadd(4, piece<PanelX>(a, 0) + at, 64);
      if (pieces > 1) _tile_loadd(5, piece<PanelX>(a, 1) + at, 64);
      if (pieces > 2) _tile_loadd(6, piece<PanelX>(a, 2) + at, 64);
      multiply_decoded(t + now * half, pieces);
      if (two) multiply_decoded(t + now * half + 64, pieces);
      now ^= 1;
      decode(at_most_32(i + 32 < inputs ? inputs - i - 32 : inputs_of(g + 1)), now);
    }
    float* acc = pending.acc[pending.now];
    _tile_stored(0, acc, 256);
    _tile_stored(1, acc + 16, 256);
    _tile_stored(2, acc + 32, 256);
    _tile_stored(3, acc + 48, 256);
    push(a, tile, row, row, rows, g, true, sums, pending);
  }
  add_pending(a, tile, row, pending, sums);
}

const decltype(Path::block) FEW_AMX[] = {few_amx<2>, few_amx<3>, few_amx<4>, few_amx<5>,
                                         few_amx<6>, few_amx<7>, few_amx<8>};

// Digits as AMX operands of 16 rows x 64 inputs, 1 KB; a chunk takes one or two of them. A row of x
// takes as many rows as it has digits, so an operand holds 16, 5 or 4 rows of x.
struct TileDigits {
  static int64_t tiles_of(int64_t inputs) { return (inputs + 63) / 64; }
  static int64_t row_tiles(const HalTiles& w) {
    return (w.s.groups - 1) * tiles_of(w.s.width) + tiles_of(group_inputs(w.s, w.s.groups - 1));
  }
  static int64_t size(const HalGemm& a) {
    const int rows = 16 / digits_of(a);
    return (a.m + rows - 1) / rows * row_tiles(a.w) * 1024;
  }
  // In the order of an unpacked chunk: inputs 0-3 of every eight, then 4-7 of every eight; each in an
  // operand of its own when there are more than 64.
  static void put(const HalTiles& w, int digits, int64_t r, int p, const Chunk& c, const int8_t* in,
                  int8_t* out) {
    const int rows = 16 / digits;
    const int64_t tile = r / rows * row_tiles(w) + c.g * tiles_of(w.s.width) + c.i / 64;
    out += tile * 1024 + (r % rows * digits + p) * 64;
    const __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + 64);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i first = _mm512_permutex2var_epi32(a, even, b);
    const __m512i second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    if (c.n > 64) {
      _mm512_storeu_si512(out, first);
      _mm512_storeu_si512(out + 1024, second);
      return;
    }
    const int64_t half = c.n / 2;
    alignas(64) int8_t both[128] = {};
    _mm512_storeu_si512(both, first);
    _mm512_storeu_si512(both + half, second);  // at most 32 bytes of it are not zero
    _mm512_storeu_si512(out, _mm512_load_si512(both));
  }
};

// Steps from .. to (of 8 inputs) of a chunk of a tile as bytes: t[v][inputs 0-3 of every step, then 4-7
// of every step], rows of 64 bytes.
template <int B>
HAL_INLINE void unpack_steps(const uint8_t* in, int64_t from, int64_t to, int64_t steps,
                             const Unpack& u, __m512i* t) {
  const __m512i nibble = _mm512_set1_epi8(15);
  in += from * 64 * B;
  for (int64_t i = from; i < to; i++, in += 64 * B) {
    prefetch_step<B>(in);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512i* out = t + 32 * v + i;
      if (B == 4) {
        const __m512i c = _mm512_loadu_si512(in + 64 * v);
        out[0] = _mm512_and_si512(c, nibble);
        out[steps] = _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble);
      } else {
        out[0] = unpack(u, in + 2 * v * 8 * B);
        out[steps] = unpack(u, in + (2 * v + 1) * 8 * B);
      }
    }
  }
}

// x: one or two operands; t: an unpacked chunk. Sums of 16 x 64 go to `out`. Calls between(v), 0 .. 3,
// with other work for the core while the matrix unit multiplies: one step after the other it was 1.4
// times slower, because nobody asked for memory during the products.
template <class Between>
HAL_INLINE void multiply_s8(const int8_t* x, const __m512i* t, int64_t inputs, int32_t* out,
                            Between between) {
  const bool two = inputs > 64;
  const __m512i* high = t + inputs / 8;
  _tile_loadd(4, x, 64);
  if (two) _tile_loadd(5, x + 1024, 64);
#define HAL_COLUMNS(v)                \
  _tile_zero(v);                      \
  _tile_loadd(6, t + 32 * v, 64);     \
  _tile_dpbsud(v, 4, 6);              \
  if (two) {                          \
    _tile_loadd(7, high + 32 * v, 64); \
    _tile_dpbsud(v, 5, 7);            \
  }
  HAL_COLUMNS(0)
  between(0);
  HAL_COLUMNS(1)
  between(1);
  HAL_COLUMNS(2)
  between(2);
  HAL_COLUMNS(3)
#undef HAL_COLUMNS
  _tile_stored(0, out, 256);
  _tile_stored(1, out + 16, 256);
  between(3);
  _tile_stored(2, out + 32, 256);
  _tile_stored(3, out + 48, 256);
}

// The sums of one multiply_s8. They are scaled during the next one: a load right behind a tile store
// waits for it.
struct DigitSums {
  alignas(64) int32_t acc[16 * TILE];
  Chunk chunk;
  int64_t row = 0, rows = 0;
};

// 16 columns from 16 * v on.
template <int P>
HAL_INLINE void scale_digits(const HalTiles& w, const Digits& x, int64_t tile, const DigitSums& d,
                             int v, float* sums) {
  if (!d.rows) return;
  const vf scale = scale_of(w, tile, d.chunk.g, v), zero = zero_of(w, tile, d.chunk.g, v);
  for (int64_t r = 0; r < d.rows; r++) {
    __m512i dots[P];
    for (int p = 0; p < P; p++) {
      dots[p] = _mm512_load_si512(d.acc + (r * P + p) * TILE + 16 * v);
    }
    add_digits<P>(w, x, d.row + r, d.chunk, scale, zero, dots, sums + r * TILE + 16 * v);
  }
}

template <int P, int B>
struct TileProduct {
  static void block(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
    const HalTiles& w = a.w;
    const Digits x = digits_in<TileDigits>(a);
    const Unpack u = unpack_of(B);
    const int64_t R = 16 / P, row_bytes = TileDigits::row_tiles(w) * 1024;
    TileConfig config;
    for (int i = 0; i < 6; i++) config.rows[i] = (uint8_t)(rows < R ? rows * P : 16);
    _tile_loadconfig(&config);
    DigitSums done[2];
    // Rows past a chunk's last input keep older codes, and meet zeros in x.
    alignas(64) __m512i t[2][4 * 32] = {};
    const uint8_t* in = tile_codes(w, tile, 0);
    const int8_t* xc = x.digits + row / R * row_bytes;
    int now = 0, sum = 0;
    Chunk c = first_chunk(w, 0);
    unpack_steps<B>(in, 0, c.n / 8, c.n / 8, u, t[0]);
    for (; c.n; now ^= 1) {
      in += c.n * 8 * B;
      const Chunk next = next_chunk(w, c);
      const int64_t steps = next.n / 8;
      for (int64_t m = 0; m < rows; m += R, sum ^= 1) {
        const DigitSums& last = done[sum ^ 1];
        const auto between = [&](int v) __attribute__((always_inline)) {
          if (m == 0) {
            unpack_steps<B>(in, steps * v / 4, steps * (v + 1) / 4, steps, u, t[now ^ 1]);
          }
          scale_digits<P>(w, x, tile, last, v, sums + (last.row - row) * TILE);
        };
        multiply_s8(xc + m / R * row_bytes, t[now], c.n, done[sum].acc, between);
        done[sum].chunk = c;
        done[sum].row = row + m;
        done[sum].rows = rows - m < R ? rows - m : R;
      }
      xc += TileDigits::tiles_of(c.n) * 1024;
      c = next;
    }
    const DigitSums& last = done[sum ^ 1];
    for (int v = 0; v < 4; v++) {
      scale_digits<P>(w, x, tile, last, v, sums + (last.row - row) * TILE);
    }
  }
};

static Path amx_path(const HalGemm& a) {
  const auto block = a.m <= 16 ? FEW_AMX[a.w.s.bits - 2] : block_amx;
  return {block, prepare_bf16<PanelX>, size_bf16<PanelX>, a.m <= 16 ? nullptr : begin_amx, end_amx};
}

}  // namespace
