// SPDX-License-Identifier: Apache-2.0
// AMX: 16 rows of x times 64 bytes of inputs times 16 columns in one instruction; codes as bytes that
// meet s8 digits of x, or as bf16.
//
// While the matrix unit multiplies one operand of rows, the core unpacks the next chunk of the weight and
// scales the sums of the operand before. One after the other took 1.4 to 3 times as long.
#pragma once
#include "gemm_bf16.h"
#include "gemm_s8.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In memory of its own: GCC 12 takes _tile_loadconfig to read 8 bytes only, and drops the others.
const TileConfig TILE_CONFIG;

static void end_amx() { _tile_release(); }

// Sums of 16 rows x 64 columns in memory: i32 of digits, f32 of bf16. They are scaled during the next
// product: a load right behind a tile store waits for it.
struct TileSums {
  alignas(64) int32_t acc[16 * TILE];
  const Columns* columns;
  int64_t row = 0, rows = 0, g = 0, chunk = 0;
};

// tmm0-3 take the sums of 64 columns, x is tmm4, the columns at t, t + next .. are tmm6 and 7 in turn.
#define HAL_FOUR_COLUMNS(dot, ready) \
  _tile_loadd(6, t, 64);             \
  ready(0);                          \
  dot(0, 4, 6);                      \
  _tile_loadd(7, t + next, 64);      \
  ready(1);                          \
  dot(1, 4, 7);                      \
  _tile_loadd(6, t + 2 * next, 64);  \
  ready(2);                          \
  dot(2, 4, 6);                      \
  _tile_loadd(7, t + 3 * next, 64);  \
  ready(3);                          \
  dot(3, 4, 7)

// Sums leave the matrix unit just before their tile is used again: the core would wait for the stores of
// those that are not ready yet.
#define HAL_AS_IT_IS(tile)
#define HAL_FREE(tile)                             \
  _tile_stored(tile, last->acc + 16 * tile, 256);  \
  _tile_zero(tile)

// Prepared x is a sequence of operands of 1 KB in the order in which they are loaded: for every M_BLOCK
// rows, for every chunk, for every operand of rows, `count` operands side by side.
struct Operands {
  int64_t of_row, rows;  // operands of a row of x; rows of x in an operand

  int64_t all(int64_t m) const { return (m + rows - 1) / rows * of_row; }
  // The first operand of a chunk, which starts with the row's operand `first` and has `count`.
  int64_t at(int64_t m, int64_t r, int64_t first, int64_t count) const {
    const int64_t block = r / M_BLOCK * M_BLOCK, left = m - block;
    const int64_t side = ((left < M_BLOCK ? left : M_BLOCK) + rows - 1) / rows;
    return block / rows * of_row + first * side + (r - block) / rows * count;
  }
};

// ---- digits: one operand holds 64 inputs of 16, 5 or 4 rows of x, a row for each digit

struct TileDigits {
  static int64_t count(int64_t inputs) { return (inputs + 63) / 64; }
  static Operands operands(const HalGemm& a) {
    const HalShape& s = a.w.s;
    const int64_t last = count(group_inputs(s, s.groups - 1));
    return {(s.groups - 1) * count(s.width) + last, 16 / digits_of(a)};
  }
  static int64_t at(const HalGemm& a, int64_t r, const Chunk& c) {
    return operands(a).at(a.m, r, c.g * count(a.w.s.width) + c.i / 64, count(c.n)) * 1024;
  }
  static int64_t size(const HalGemm& a) { return operands(a).all(a.m) * 1024; }
  // In the order of an unpacked chunk: inputs 0-3 of every eight, then 4-7 of every eight; each in an
  // operand of its own when there are more than 64.
  static void put(const HalGemm& a, int digits, int64_t r, int p, const Chunk& c, const int8_t* in,
                  int8_t* out) {
    out += at(a, r, c) + (r % M_BLOCK % (16 / digits) * digits + p) * 64;
    const __m512i low = _mm512_loadu_si512(in), high = _mm512_loadu_si512(in + 64);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i first = _mm512_permutex2var_epi32(low, even, high);
    const __m512i second = _mm512_permutex2var_epi32(low, odd, high);
    if (c.n > 64) {
      _mm512_storeu_si512(out, first);
      _mm512_storeu_si512(out + 1024, second);
      return;
    }
    alignas(64) int8_t both[128];
    _mm512_storeu_si512(both, first);
    _mm512_storeu_si512(both + c.n / 2, second);
    _mm512_storeu_si512(out, _mm512_load_si512(both));
  }
};

template <int P, int B>
struct DigitTiles {
  static const int ROWS = 16 / P, BUFFERS = 2, COLUMN = 2 * X_CHUNK / 8;  // vectors of a column
  const HalTiles& w;
  Digits x;
  Unpack<B> u;

  explicit DigitTiles(const HalGemm& a) : w(a.w), x(digits_in<TileDigits>(a)) {}

  static int64_t count(int64_t inputs) { return TileDigits::count(inputs); }
  const char* operands(const HalGemm& a, int64_t r, const Chunk& c) const {
    return (const char*)x.digits + TileDigits::at(a, r, c);
  }
  // Vectors of a column in front of an operand's.
  static int64_t first(int64_t inputs, int64_t operand) { return inputs / 8 * operand; }
  // Steps of the next chunk that may be unpacked after so many operands.
  static int64_t free_steps(int64_t steps, int64_t done, int64_t count) { return steps * done / count; }

  // Steps (of 8 inputs) of a chunk as bytes: inputs 0-3 of every step, then 4-7 of every step. What is
  // behind the last one meets zeros in x.
  HAL_MEMBER void unpack_steps(const uint8_t* in, int64_t from, int64_t to, int64_t steps,
                               __m512i* t) const {
    in += from * step_bytes(B);
    for (int64_t i = from; i < to; i++, in += step_bytes(B)) {
      prefetch_step<B>(in);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        __m512i* out = t + COLUMN * v + i;
        out[0] = u.piece(in, 2 * v);
        out[steps] = u.piece(in, 2 * v + 1);
      }
    }
  }

  HAL_MEMBER void multiply(const char* operand, const __m512i* t, TileSums* last) const {
    const int64_t next = COLUMN;
    _tile_loadd(4, operand, 64);
    if (last) {
      HAL_FOUR_COLUMNS(_tile_dpbsud, HAL_FREE);
    } else {
      HAL_FOUR_COLUMNS(_tile_dpbsud, HAL_AS_IT_IS);
    }
  }

  template <bool ZERO>
  HAL_MEMBER void scale_rows(const TileSums& d, int64_t from, int64_t to, float* sums) const {
    const Columns c = *d.columns;
    const Digits own = x;
    for (int64_t r = from; r < to; r++) {
      const RowOfDigits<P> row(own, d.row + r, d.g, d.chunk);
      const int32_t* acc = d.acc + r * P * TILE;
      vf y[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        __m512i dots[P];
        for (int p = 0; p < P; p++) dots[p] = _mm512_load_si512(acc + p * TILE + 16 * v);
        y[v] = row.template add<ZERO>(dots, c.scale[v], c.zero[v], load<HAL_F32>(sums + r * TILE + 16 * v));
      }
      for (int v = 0; v < 4; v++) store<HAL_F32>(sums + r * TILE + 16 * v, y[v]);
    }
  }

  HAL_MEMBER void scale(const TileSums& d, int64_t from, int64_t to, float* sums) const {
    if (w.zero) scale_rows<true>(d, from, to, sums);
    else scale_rows<false>(d, from, to, sums);
  }
};

// ---- bf16: one operand holds 32 inputs of 16 rows of x

// f16 is a sum of two bf16 (11 bits of 16), f32 of three (24 of 24): a second and a third matrix.
struct TileX {
  static int64_t count(int64_t inputs) { return (padded(inputs) + 31) / 32; }
  static Operands operands(const HalGemm& a) {
    const HalShape& s = a.w.s;
    return {(s.groups - 1) * count(s.width) + count(group_inputs(s, s.groups - 1)), 16};
  }
  static int64_t at(const HalGemm& a, int64_t r, const Chunk& c, int64_t i) {
    const int64_t first = c.g * count(a.w.s.width) + c.i / 32;
    return (operands(a).at(a.m, r, first, count(c.n)) + i / 32) * 512 + r % 16 * 32;
  }
  static int64_t end(int64_t n) { return (n + 31) & ~(int64_t)31; }
  static int64_t size(const HalGemm& a) { return operands(a).all(a.m) * 512; }
  static int pieces(const HalGemm& a) {
    return a.w.s.dtype == HAL_BF16 ? 1 : a.w.s.dtype == HAL_F16 ? 2 : 3;
  }
};

// bf16 of the low bytes of 16-bit lanes, minus center. A whole number up to 255 is an f16 whose last
// three bits are 0; without them, and with 112 added to the exponent, it is a bf16.
HAL_INLINE __m512i bf16_of(__m512i codes, __m512i center) {
  const __m512i n = _mm512_sub_epi16(codes, center);
  const __m512i half = _mm512_castph_si512(_mm512_cvtepi16_ph(n));
  const __m512i moved = _mm512_and_si512(_mm512_srai_epi16(half, 3), _mm512_set1_epi16((short)0x8fff));
  return _mm512_maskz_add_epi16(_mm512_test_epi16_mask(n, n), moved, _mm512_set1_epi16(0x3800));
}

template <int PIECES, int B>
struct Bf16Tiles {
  static const int ROWS = 16, BUFFERS = 1, COLUMN = X_CHUNK / 2;
  const HalTiles& w;
  const uint16_t* x;
  const float* xsum;
  int64_t size, m;
  Unpack<B> u;
  __m512i table, center;

  explicit Bf16Tiles(const HalGemm& a)
      : w(a.w), x(piece<TileX>(a, 0)), xsum(chunk_sums<TileX>(a)), size(TileX::size(a)),
        m(a.m), table(small_table(a.w)),
        center(_mm512_set1_epi16(a.w.zero ? 0 : 1 << (B - 1))) {}

  static int64_t count(int64_t inputs) { return TileX::count(inputs); }
  const char* operands(const HalGemm& a, int64_t r, const Chunk& c) const {
    return (const char*)(x + TileX::at(a, r - r % 16, c, 0));
  }
  static int64_t first(int64_t, int64_t operand) { return 16 * operand; }
  // In place: the vectors of an operand are free after it, 16 KB stay in L1 with the sums.
  static int64_t free_steps(int64_t steps, int64_t done, int64_t count) {
    return done == count || 4 * done > steps ? steps : 4 * done;
  }

  // Steps of a chunk as pairs in the order of prepared x, zeros behind the last.
  HAL_MEMBER void unpack_steps(const uint8_t* in, int64_t from, int64_t to, int64_t steps,
                               __m512i* t) const {
    in += from * step_bytes(B);
    const __m512i byte = _mm512_set1_epi16(255);
    for (int64_t i = from; i < to; i++, in += step_bytes(B)) {
      prefetch_step<B>(in);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        __m512i* out = t + COLUMN * v + 4 * i;
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          if (B < 6) {
            table_pairs(u, in, 2 * v + h, table, out + h, out + 2 + h);
            continue;
          }
          const __m512i c = u.piece(in, 2 * v + h);
          out[h] = bf16_of(_mm512_and_si512(c, byte), center);
          out[2 + h] = bf16_of(_mm512_srli_epi16(c, 8), center);
        }
      }
    }
    for (int64_t i = 4 * to; to == steps && i % 16; i++) {
      for (int v = 0; v < 4; v++) t[COLUMN * v + i] = _mm512_setzero_si512();
    }
  }

  HAL_MEMBER void multiply(const char* operand, const __m512i* t, TileSums* last) const {
    const int64_t next = COLUMN;
    _tile_loadd(4, operand, 64);
    if (last) {
      HAL_FOUR_COLUMNS(_tile_dpbf16ps, HAL_FREE);
    } else {
      HAL_FOUR_COLUMNS(_tile_dpbf16ps, HAL_AS_IT_IS);
    }
    if (PIECES > 1) {
      _tile_loadd(4, operand + 2 * size, 64);
      HAL_FOUR_COLUMNS(_tile_dpbf16ps, HAL_AS_IT_IS);
    }
    if (PIECES > 2) {
      _tile_loadd(4, operand + 4 * size, 64);
      HAL_FOUR_COLUMNS(_tile_dpbf16ps, HAL_AS_IT_IS);
    }
  }

  template <bool ZERO>
  HAL_MEMBER void scale_rows(const TileSums& d, int64_t from, int64_t to, float* sums) const {
    const Columns c = *d.columns;
    const float* own = xsum + d.chunk * m + d.row;
    for (int64_t r = from; r < to; r++) {
      const vf sum = set1(ZERO ? own[r] : 0);
      vf y[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const vf acc = load<HAL_F32>((const float*)d.acc + r * TILE + 16 * v);
        const vf dots = ZERO ? _mm512_fnmadd_ps(c.zero[v], sum, acc) : acc;
        y[v] = fma(c.scale[v], dots, load<HAL_F32>(sums + r * TILE + 16 * v));
      }
      for (int v = 0; v < 4; v++) store<HAL_F32>(sums + r * TILE + 16 * v, y[v]);
    }
  }

  HAL_MEMBER void scale(const TileSums& d, int64_t from, int64_t to, float* sums) const {
    if (w.zero) scale_rows<true>(d, from, to, sums);
    else scale_rows<false>(d, from, to, sums);
  }
};

#undef HAL_FOUR_COLUMNS
#undef HAL_FREE
#undef HAL_AS_IT_IS

// ---- both

template <class Tiles>
static void block_amx(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  const Tiles tiles(a);
  const int64_t R = Tiles::ROWS;
  TileConfig config;
  const int digits = 16 / (int)R;
  for (int i = 0; i < 6; i++) config.rows[i] = (uint8_t)(rows < R ? rows * digits : 16);
  _tile_loadconfig(&config);
  alignas(64) __m512i t[Tiles::BUFFERS][4 * Tiles::COLUMN];
  Columns columns[3];  // sums are scaled two products after their own
  TileSums done[2];
  done[0].columns = done[1].columns = columns;
  TileSums *last = done, *before = done + 1;
  const uint8_t* in = tile_codes(w, tile, 0);
  int now = 0, own = 0;
  Chunk c = first_chunk(w, 0);
  tiles.unpack_steps(in, 0, c.n / 8, c.n / 8, t[0]);
  for (; c.n; now ^= 1, own = own == 2 ? 0 : own + 1) {
    in += c.n * 8 * w.s.bits;
    const Chunk next = next_chunk(w, c);
    const int64_t count = Tiles::count(c.n), steps = next.n / 8;
    __m512i *from = t[now % Tiles::BUFFERS], *to = t[(now ^ 1) % Tiles::BUFFERS];
    columns[own] = columns_of(w, tile, c.g);
    const char* x = tiles.operands(a, row, c);
    // Lines of the next chunk to fetch beside every operand but those of the last rows, which unpack it.
    const int64_t others = (rows - 1) / R * count;
    const int64_t lines = others ? (next.n * w.s.bits / 8 + others - 1) / others : 0;
    const uint8_t* ahead = in;
    for (int64_t m = 0; m < rows; m += R) {
      float* before_sums = sums + (before->row - row) * TILE;
      int64_t unpacked = 0, scaled = 0, part = before->rows / count;
      for (int64_t j = 0; j < count; j++, x += 1024) {
        tiles.multiply(x, from + Tiles::first(c.n, j), j ? nullptr : last);
        if (m + R >= rows) {
          const int64_t until = Tiles::free_steps(steps, j + 1, count);
          tiles.unpack_steps(in, unpacked, until, steps, to);
          unpacked = until;
        } else {
          for (int64_t i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead);
        }
        const int64_t until = j + 1 == count ? before->rows : scaled + part;
        tiles.scale(*before, scaled, until, before_sums);
        scaled = until;
      }
      TileSums& d = *before;
      d.columns = columns + own;
      d.row = row + m;
      d.rows = rows - m < R ? rows - m : R;
      d.g = c.g;
      d.chunk = c.index;
      before = last;
      last = &d;
    }
    c = next;
  }
  _tile_stored(0, last->acc, 256);
  _tile_stored(1, last->acc + 16, 256);
  _tile_stored(2, last->acc + 32, 256);
  _tile_stored(3, last->acc + 48, 256);
  tiles.scale(*before, 0, before->rows, sums + (before->row - row) * TILE);
  tiles.scale(*last, 0, last->rows, sums + (last->row - row) * TILE);
}

template <int P, int B>
struct DigitProduct {
  static void block(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
    block_amx<DigitTiles<P, B>>(a, tile, row, rows, sums);
  }
};

static Path digits_amx(const HalGemm& a) {
  Path path = digits_path<DigitProduct, TileDigits>(a);
  path.end = end_amx;
  return path;
}

static Path bf16_amx(const HalGemm& a) {
  Path path = {nullptr, prepare_bf16<TileX>, size_bf16<TileX>, end_amx};
  by_bits(a.w.s.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    const int pieces = TileX::pieces(a);
    path.block = pieces == 1   ? block_amx<Bf16Tiles<1, B>>
                 : pieces == 2 ? block_amx<Bf16Tiles<2, B>>
                               : block_amx<Bf16Tiles<3, B>>;
  });
  return path;
}

}  // namespace
