// SPDX-License-Identifier: Apache-2.0
// AMX, many rows of bf16: the weight is rounded to bf16, scales and all, as a dense model would hold it,
// and multiplied in panels that stay in the L2. Sums then stay in the matrix unit from group to group:
// groups of 32 cost what groups of 128 do. Every weight is decoded once for PANEL_ROWS rows.
#pragma once

namespace {

const int64_t PANEL_K = 256;     // inputs: with them 32 rows of x take 16 KB of the L1, 32 columns as many
const int64_t PANEL_TILES = 4;   // 256 columns: a panel takes 128 KB
const int64_t PANEL_ROWS = 512;  // their sums take 512 KB
const int64_t OPERAND = 512;     // numbers: 16 rows x 32 inputs, or 16 pairs of inputs x 16 columns

// Prepared x: for every 32 rows pairs of operands of 32 inputs, zeros behind the last input. Rows behind
// the last of x hold anything: their sums are never looked at.
struct PanelX {
  static int64_t pairs(const HalTiles& w) { return (w.kp + 31) / 32; }
  static int64_t size(const HalGemm& a) { return (a.m + 31) / 32 * pairs(a.w) * 2 * OPERAND; }
  static uint16_t* at(const HalGemm& a, int64_t row, int64_t input) {
    const int64_t pair = row / 32 * pairs(a.w) + input / 32;
    return (uint16_t*)a.prepared + pair * 2 * OPERAND + row % 32 * 32 + input % 32;
  }
};

static int64_t size_panel(const HalGemm& a) { return PanelX::size(a) * 2; }

static void prepare_panel(const HalGemm& a, int64_t row, int64_t end) {
  const HalTiles& w = a.w;
  const bool dense = w.kp == w.s.k;  // no padding between groups: as one
  const int64_t groups = dense ? 1 : w.s.groups;
  for (int64_t r = row; r < end; r++) {
    const uint16_t* x = (const uint16_t*)a.x + r * w.s.k;
    for (int64_t g = 0; g < groups; g++, x += w.s.width) {
      const int64_t n = dense ? w.kp : group_inputs(w.s, g), start = group_start(w.s, g);
      int64_t i = 0;
      if (start % 32 == 0) {
        for (; i + 32 <= n; i += 32) {
          _mm512_storeu_si512(PanelX::at(a, r, start + i), _mm512_loadu_si512(x + i));
        }
      }
      for (; i < n; i += 8) {
        const __mmask8 some = n - i < 8 ? (1u << (n - i)) - 1 : 255;
        _mm_storeu_si128((__m128i*)PanelX::at(a, r, start + i), _mm_maskz_loadu_epi16(some, x + i));
      }
    }
    for (int64_t i = w.kp; i % 32; i += 8) {
      _mm_storeu_si128((__m128i*)PanelX::at(a, r, i), _mm_setzero_si128());
    }
  }
}

// Two columns of numbers to pairs of bf16.
HAL_INLINE __m512i paired(vf first, vf second) {
  const __m512i one_by_one = _mm512_set_epi32(
      0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a, 0x00190009, 0x00180008,
      0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002, 0x00110001, 0x00100000);
  return _mm512_permutexvar_epi16(one_by_one, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// `inputs` of a tile from padded input k, a multiple of PANEL_K, to the operands of its four columns of
// 16: panel[4][PANEL_K / 32], zeros behind the last input.
template <int B>
HAL_INLINE void decode_panel(const HalTiles& w, int64_t tile, int64_t k, int64_t inputs,
                             uint16_t* panel) {
  const Unpack<B> u;
  const __m512i lane = _mm512_set1_epi32((int)0x80808000);
  const int64_t width = padded(w.s.width);
  const uint8_t* in = tile_codes(w, tile, k);
  Columns c = columns_of(w, tile, k / width);
  vf less[4];  // scale * zero point
  for (int64_t i = 0; i < inputs; i += 8, in += step_bytes(B)) {
    if (i == 0 || (k + i) % width == 0) {
      c = columns_of(w, tile, (k + i) / width);
      for (int v = 0; v < 4; v++) {
        const vf zero = w.zero ? c.zero[v] : set1((float)(1 << (B - 1)));
        less[v] = mul(c.scale[v], zero);
      }
    }
    prefetch_step<B>(in);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      uint16_t* out = panel + v * (PANEL_K * 16) + i * 16;
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m512i codes = u.piece(in, 2 * v + h);
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const __m512i from = _mm512_add_epi8(
              lane, _mm512_set_epi32(12 + j, 8 + j, 4 + j, j, 12 + j, 8 + j, 4 + j, j, 12 + j, 8 + j,
                                     4 + j, j, 12 + j, 8 + j, 4 + j, j));
          const __m512i code = _mm512_shuffle_epi8(codes, from);
          x[j] = _mm512_fmsub_ps(_mm512_cvtepi32_ps(code), c.scale[v], less[v]);
        }
        _mm512_storeu_si512(out + 64 * h, paired(x[0], x[1]));
        _mm512_storeu_si512(out + 64 * h + 32, paired(x[2], x[3]));
      }
    }
  }
  for (int64_t i = inputs; i % 32; i += 8) {
    for (int v = 0; v < 4; v++) __builtin_memset(panel + v * (PANEL_K * 16) + i * 16, 0, 256);
  }
}

// The core would wait for stores of sums that are not ready yet: each leaves the matrix unit just before its
// tile is used again.
#define HAL_NEXT_SUMS(tile, at)                     \
  {                                                 \
    _tile_stored(tile, last + (at), line);          \
    if (more) _tile_loadd(tile, sums + (at), line); \
    else _tile_zero(tile);                          \
  }

// 32 rows x 32 columns: sums (+)= x . w over some operands, left in the matrix unit, from where those of
// `last` leave. With each operand 256 bytes `ahead` are fetched.
HAL_INLINE void multiply_panel(const uint16_t* x, const uint16_t* w, int64_t operands, bool more,
                               const uint16_t* ahead, const float* sums, float* last) {
  const int64_t next_w = PANEL_K * 16, line = TILE * 4;
  for (int64_t i = 0; i < operands; i++, x += 2 * OPERAND, w += OPERAND) {
    _tile_loadd(4, x, 64);
    for (int j = 0; j < 4; j++, ahead += 32) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(6, w, 64);
    if (i == 0) HAL_NEXT_SUMS(0, 0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + next_w, 64);
    if (i == 0) HAL_NEXT_SUMS(1, 16);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + OPERAND, 64);
    if (i == 0) HAL_NEXT_SUMS(2, 16 * TILE);
    _tile_dpbf16ps(2, 5, 6);
    if (i == 0) HAL_NEXT_SUMS(3, 16 * TILE + 16);
    _tile_dpbf16ps(3, 5, 7);
  }
}

#undef HAL_NEXT_SUMS

template <int B>
static void panel_tiles(const HalGemm& a, int64_t tile, int64_t end) {
  const HalTiles& w = a.w;
  alignas(64) uint16_t panel[PANEL_TILES][4 * PANEL_K * 16];
  alignas(64) float sums[PANEL_TILES][PANEL_ROWS * TILE + 16], nowhere[32 * TILE];
  float* last = nowhere;
  _tile_loadconfig(&TILE_CONFIG);
  for (int64_t row = 0; row < a.m; row += PANEL_ROWS) {
    const int64_t rows = at_most(a.m - row, PANEL_ROWS);
    for (int64_t t = tile; t < end; t += PANEL_TILES) {
      const int64_t tiles = at_most(end - t, PANEL_TILES);
      for (int64_t k = 0; k < w.kp; k += PANEL_K) {
        const int64_t inputs = at_most(w.kp - k, PANEL_K), operands = (inputs + 31) / 32;
        for (int64_t i = 0; i < tiles; i++) decode_panel<B>(w, t + i, k, inputs, panel[i]);
        for (int64_t r = 0; r < rows; r += 32) {
          const uint16_t* x = PanelX::at(a, row + r, k);
          const uint16_t* next = PanelX::at(a, row + r + 32, k);  // an eighth beside every 32 columns
          for (int64_t i = 0; i < 2 * tiles; i++, next += PANEL_K * 4) {
            const uint16_t* own = panel[i / 2] + i % 2 * 2 * PANEL_K * 16;
            float* to = sums[i / 2] + r * TILE + i % 2 * 32;
            multiply_panel(x, own, operands, k > 0, next, to, last);
            last = to;
          }
        }
      }
      const int64_t line = TILE * 4;
      _tile_stored(0, last, line);
      _tile_stored(1, last + 16, line);
      _tile_stored(2, last + 16 * TILE, line);
      _tile_stored(3, last + 16 * TILE + 16, line);
      for (int64_t i = 0; i < tiles; i++) finish<HAL_BF16>(a, t + i, row, rows, sums[i]);
    }
  }
  _tile_release();
}

static Path panel_path(const HalGemm& a) {
  Path path = {nullptr, prepare_panel, size_panel};
  by_bits(a.w.s.bits, [&](auto bits) { path.tiles = panel_tiles<decltype(bits)::value>; });
  return path;
}

}  // namespace
