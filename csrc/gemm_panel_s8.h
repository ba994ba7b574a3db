// SPDX-License-Identifier: Apache-2.0
// AMX, many rows of 8-bit activations: codes less their zero points, as s8, in panels that stay in the L2.
// Every weight is unpacked once for PANEL_ROWS rows, and sums are in the L1 while a panel passes.
//
// A chunk of a group takes the matrix unit as long as scaling its sums takes the core, so that both must
// work at once. The core would wait for the stores of sums that are not ready yet: they are stored during
// the next product, each just before its tile is used again, and scaled during the one after.
#pragma once

namespace {

const int64_t PANEL_CHUNKS = 4;
const int64_t CODES_COLUMN = 2 * X_CHUNK / 8;  // vectors of a chunk of 16 columns

// Scales of 32 columns, and what the integers' bias becomes by them.
struct PanelScale {
  vf scale[2], off[2];
};

// 32 rows x 32 columns of sums over a chunk, on their way from the matrix unit to those of the product.
struct PanelDots {
  int32_t* dots;  // [32][32]
  const PanelScale* columns;
  const float* step;  // [32]
  float* sums;        // [32][TILE]
};

// Whether codes less zero points are s8, and 1.5 * 2^23 scales are exact in f32.
HAL_INLINE bool fits_panel_s8(const HalTiles& w) {
  return !(w.zero && w.s.bits == 8) && w.s.scale_dtype != HAL_F32;
}

// sums += scale * dots * step. BIAS makes a float of an integer; its product is taken off by the same fused
// operation that multiplies, without error.
HAL_INLINE void scale_dots(const PanelDots& d, int64_t from, int64_t to) {
  const __m512i bias = _mm512_set1_epi32(BIAS);
  const vf scale0 = d.columns->scale[0], scale1 = d.columns->scale[1];
  const vf off0 = d.columns->off[0], off1 = d.columns->off[1];
#pragma GCC unroll 8
  for (int64_t r = from; r < to; r++) {
    const vf step = set1(d.step[r]);
    const __m512i first = _mm512_add_epi32(bias, _mm512_load_si512(d.dots + 32 * r));
    const __m512i second = _mm512_add_epi32(bias, _mm512_load_si512(d.dots + 32 * r + 16));
    float* out = d.sums + r * TILE;
    const vf y0 = fma(scale0, _mm512_castsi512_ps(first), off0);
    const vf y1 = fma(scale1, _mm512_castsi512_ps(second), off1);
    store<HAL_F32>(out, fma(y0, step, load<HAL_F32>(out)));
    store<HAL_F32>(out + 16, fma(y1, step, load<HAL_F32>(out + 16)));
  }
}

// A chunk of a tile at `in`: panel[4][CODES_COLUMN], in the order of prepared x; what is behind its last
// input meets zeros there.
template <int B>
HAL_INLINE void unpack_panel(const HalTiles& w, int64_t tile, const Chunk& c, const uint8_t* in,
                             __m512i* panel, PanelScale* scale) {
  const Unpack<B> u;
  const Columns columns = columns_of(w, tile, c.g);
  const int64_t steps = c.n / 8;
  __m512i zero[4];
  for (int v = 0; v < 4; v++) {
    const vf center = w.zero ? columns.zero[v] : set1((float)(1 << (B - 1)));
    zero[v] = _mm512_mullo_epi32(_mm512_cvtps_epi32(center), _mm512_set1_epi32(0x01010101));
    scale[v / 2].scale[v % 2] = columns.scale[v];
    scale[v / 2].off[v % 2] = mul(columns.scale[v], set1(-bits_as<float>(BIAS)));
  }
  for (int64_t i = 0; i < steps; i++, in += step_bytes(B)) {
    prefetch_step<B>(in);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512i* out = panel + CODES_COLUMN * v + i;
      out[0] = _mm512_sub_epi8(u.piece(in, 2 * v), zero[v]);
      out[steps] = _mm512_sub_epi8(u.piece(in, 2 * v + 1), zero[v]);
    }
  }
}

// The product of a chunk of `steps` of 8 inputs, one or two operands: 16 rows at x and 16 at y times 32
// columns at w. Its sums stay in the matrix unit; those of `last` leave it, those of `before` are scaled.
template <int OPERANDS>
HAL_INLINE void multiply_s8(const int8_t* x, const int8_t* y, const __m512i* w, int64_t steps,
                            const PanelDots& last, const PanelDots& before) {
  const __m512i* v = w + CODES_COLUMN;
  const int64_t rows = 8 / OPERANDS;
  _tile_loadd(4, x, 64);
  _tile_loadd(6, w, 64);
  _tile_stored(0, last.dots, 128);
  _tile_zero(0);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(7, v, 64);
  scale_dots(before, 0, rows);
  _tile_stored(1, last.dots + 16, 128);
  _tile_zero(1);
  _tile_dpbssd(1, 4, 7);
  _tile_loadd(5, y, 64);
  scale_dots(before, rows, 2 * rows);
  _tile_stored(2, last.dots + 512, 128);
  _tile_zero(2);
  _tile_dpbssd(2, 5, 6);
  scale_dots(before, 2 * rows, 3 * rows);
  _tile_stored(3, last.dots + 528, 128);
  _tile_zero(3);
  _tile_dpbssd(3, 5, 7);
  scale_dots(before, 3 * rows, 4 * rows);
  if (OPERANDS == 1) return;
  _tile_loadd(4, x + 1024, 64);
  _tile_loadd(6, w + steps, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(7, v + steps, 64);
  scale_dots(before, 16, 20);
  _tile_dpbssd(1, 4, 7);
  _tile_loadd(5, y + 1024, 64);
  scale_dots(before, 20, 24);
  _tile_dpbssd(2, 5, 6);
  scale_dots(before, 24, 28);
  _tile_dpbssd(3, 5, 7);
  scale_dots(before, 28, 32);
}

// Chunks of some tiles, unpacked.
struct CodesPanel {
  __m512i codes[PANEL_TILES][PANEL_CHUNKS][4 * CODES_COLUMN];
  PanelScale scale[PANEL_TILES][PANEL_CHUNKS][2];
  Chunk chunks[PANEL_CHUNKS];
  int64_t count, tiles;

  // From chunk c at padded input k on; moves both behind the last that it holds.
  template <int B>
  HAL_MEMBER void fill(const HalTiles& w, int64_t tile, Chunk& c, int64_t& k) {
    for (count = 0; c.n && count < PANEL_CHUNKS; count++, k += c.n, c = next_chunk(w, c)) {
      for (int64_t i = 0; i < tiles; i++) {
        unpack_panel<B>(w, tile + i, c, tile_codes(w, tile + i, k), codes[i][count], scale[i][count]);
      }
      chunks[count] = c;
    }
  }
};

// Rows of x, from `row` on, times a panel. Sums are in blocks of PANEL_ROWS rows and a tile; those of rows
// behind the last, up to a whole 32, hold anything.
static void multiply_panel_s8(const HalGemm& a, const CodesPanel& p, int64_t row, int64_t rows,
                              float (*sums)[PANEL_ROWS * TILE + 16]) {
  const Digits x = digits_in<TileDigits>(a);
  alignas(64) int32_t dots[2][32 * 32];
  alignas(64) float nowhere[32 * TILE];
  PanelDots last = {dots[0], p.scale[0][0], x.step, nowhere};
  PanelDots before = {dots[1], p.scale[0][0], x.step, nowhere};
  for (int64_t r = 0; r < rows; r += 32) {
    const int8_t* digits[PANEL_CHUNKS];
    for (int64_t j = 0; j < p.count; j++) {
      digits[j] = x.digits + TileDigits::at(a, row + r, p.chunks[j]);
    }
    for (int64_t i = 0; i < 2 * p.tiles; i++) {
      for (int64_t j = 0; j < p.count; j++) {
        const int64_t steps = p.chunks[j].n / 8, operands = TileDigits::count(p.chunks[j].n);
        const int8_t* second = digits[j] + (rows - r > 16 ? operands * 1024 : 0);
        const int8_t* ahead = digits[j] + operands * (2048 + 256 * i);  // an eighth of the next 32 rows
        for (int64_t n = 0; n < 4 * operands; n++) __builtin_prefetch(ahead + 64 * n, 0, 2);
        const __m512i* codes = p.codes[i / 2][j] + i % 2 * 2 * CODES_COLUMN;
        if (operands == 2) multiply_s8<2>(digits[j], second, codes, steps, last, before);
        else multiply_s8<1>(digits[j], second, codes, steps, last, before);
        int32_t* free = before.dots;
        before = last;
        last = {free, &p.scale[i / 2][j][i % 2], x.step + p.chunks[j].g * x.m + row + r,
                sums[i / 2] + r * TILE + i % 2 * 32};
      }
    }
  }
  _tile_stored(0, last.dots, 128);
  _tile_stored(1, last.dots + 16, 128);
  _tile_stored(2, last.dots + 512, 128);
  _tile_stored(3, last.dots + 528, 128);
  scale_dots(before, 0, 32);
  scale_dots(last, 0, 32);
}

template <int B>
static void panel_s8_tiles(const HalGemm& a, int64_t tile, int64_t end) {
  const HalTiles& w = a.w;
  alignas(64) CodesPanel panel;
  alignas(64) float sums[PANEL_TILES][PANEL_ROWS * TILE + 16];
  _tile_loadconfig(&TILE_CONFIG);
  for (int64_t row = 0; row < a.m; row += PANEL_ROWS) {
    const int64_t rows = at_most(a.m - row, PANEL_ROWS), room = (rows + 31) / 32 * 32;
    for (int64_t t = tile; t < end; t += PANEL_TILES) {
      panel.tiles = at_most(end - t, PANEL_TILES);
      for (int64_t i = 0; i < panel.tiles; i++) {
        for (int64_t c = 0; c < room * TILE; c += 16) store<HAL_F32>(sums[i] + c, set1(0));
      }
      Chunk c = first_chunk(w, 0);
      for (int64_t k = 0; c.n;) {
        panel.template fill<B>(w, t, c, k);
        multiply_panel_s8(a, panel, row, rows, sums);
      }
      by_dtype(w.s.dtype, [&](auto dtype) {
        for (int64_t i = 0; i < panel.tiles; i++) {
          finish<decltype(dtype)::value>(a, t + i, row, rows, sums[i]);
        }
      });
    }
  }
  _tile_release();
}

static Path panel_s8_path(const HalGemm& a) {
  Path path = digits_amx(a);
  by_bits(a.w.s.bits, [&](auto bits) { path.tiles = panel_s8_tiles<decltype(bits)::value>; });
  return path;
}

}  // namespace
