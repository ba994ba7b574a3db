// SPDX-License-Identifier: Apache-2.0
// AVX-512: 4-bit codes decoded by register tables for up to four rows of x, and bf16 dot products.
#pragma once

namespace {

// Rows served without storing the decoded tile. AMX on bf16 wins from two rows on (0.84 ms for 2 to
// 8 rows of 4096 x 4096 against 0.98 for two rows decoded in registers).
const int FEW = 4;

// Calls body with `rows` = 1 .. FEW as a compile-time constant.
template <class Body>
HAL_INLINE void few_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: body(Rows<1>()); break;
    case 2: body(Rows<2>()); break;
    case 3: body(Rows<3>()); break;
    default: body(Rows<4>());
  }
}

// Nibble t of a lane is input t / 2 + t % 2 * 4; vpermps looks at the low four bits of a lane only,
// so a shift and a table give code - zero without masks.
template <int R>
HAL_INLINE void nibbles_f32(const HalTiles& w, const float* x, int64_t tile, float* sums) {
  const float center = w.zero ? 0.0f : 8.0f;
  const vf table = _mm512_sub_ps(
      _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
      set1(center));
  const uint8_t* in = tile_codes(w, tile, 0);
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g));
    const float* xg = x + group_start(w.s, g);
    vf acc[R][4], zero[4];
    for (int v = 0; v < 4; v++) {
      zero[v] = w.zero ? zero_of(w, tile, g, v) : set1(0);
      for (int r = 0; r < R; r++) acc[r][v] = set1(0);
    }
    for (int64_t k = 0; k < inputs; k += 8, in += 256) {
      for (int v = 0; v < 4; v++) {
        const __m512i codes = _mm512_loadu_si512(in + 64 * v);
        _mm_prefetch((const char*)in + 64 * v + 4096, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
          vf q = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * t), table);
          if (w.zero) q = sub(q, zero[v]);
          for (int r = 0; r < R; r++) {
            acc[r][v] = fma(q, set1(xg[r * w.kp + k + t / 2 + t % 2 * 4]), acc[r][v]);
          }
        }
      }
    }
    for (int v = 0; v < 4; v++) {
      const vf scale = scale_of(w, tile, g, v);
      for (int r = 0; r < R; r++) {
        float* c = sums + r * TILE + 16 * v;
        store<HAL_F32>(c, fma(scale, acc[r][v], load<HAL_F32>(c)));
      }
    }
  }
}

static void few_f32(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const float* x = (const float*)a.prepared + row * a.w.kp;
  few_rows(rows, [&](auto r) __attribute__((always_inline)) {
    nibbles_f32<decltype(r)::value>(a.w, x, tile, sums);
  });
}

#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI

// bf16: prepared x holds every 8 inputs in the order 0 2 4 6 1 3 5 7, the order in which a shift by
// 0, 4, 8, 12 brings the nibbles of a 16-bit lane out as pairs. Behind it: the sum of x over each
// group, which takes the zero points off (dot(q - z, x) = dot(q, x) - z * sum(x)).

// x as rows [m, kp].
struct RowX {
  static int64_t at(const HalTiles& w, int64_t r, int64_t g, int64_t i) {
    return r * w.kp + group_start(w.s, g) + i;
  }
  static int64_t end(const HalTiles&, int64_t n) { return padded(n); }
  static int64_t size(const HalGemm& a) { return a.m * a.w.kp; }
  static int pieces(const HalGemm&) { return 1; }
};

// x as AMX operands: 16 rows x 32 inputs in 1 KB, every group padded with zeros to 32 inputs (as rows
// 8 KB apart they were fetched from L2 line by line). f16 is a sum of two bf16 (11 bits of 16), f32
// of three (24 of 24): a second and a third matrix.
struct PanelX {
  static int64_t group_panels(const HalTiles& w) { return (padded(w.s.width) + 31) / 32; }
  static int64_t row_panels(const HalTiles& w) {
    const int64_t last = w.s.groups - 1;
    return last * group_panels(w) + (padded(group_inputs(w.s, last)) + 31) / 32;
  }
  static int64_t at(const HalTiles& w, int64_t r, int64_t g, int64_t i) {
    const int64_t panel = r / 16 * row_panels(w) + g * group_panels(w) + i / 32;
    return panel * 512 + r % 16 * 32 + i % 32;
  }
  static int64_t end(const HalTiles&, int64_t n) { return (n + 31) & ~(int64_t)31; }
  static int64_t size(const HalGemm& a) { return (a.m + 15) / 16 * row_panels(a.w) * 512; }
  static int pieces(const HalGemm& a) {
    return a.w.s.dtype == HAL_BF16 ? 1 : a.w.s.dtype == HAL_F16 ? 2 : 3;
  }
};

template <class X>
HAL_INLINE uint16_t* piece(const HalGemm& a, int i) {
  return (uint16_t*)a.prepared + i * X::size(a);
}
template <class X>
HAL_INLINE float* group_sums(const HalGemm& a) {
  return (float*)piece<X>(a, X::pieces(a));
}
template <class X>
static int64_t size_bf16(const HalGemm& a) {
  return (X::pieces(a) * X::size(a)) * 2 + a.m * a.w.s.groups * 4;
}

// 8 inputs (n of them real) in dot order, one bf16 a piece; returns their sum.
template <int F>
HAL_INLINE float prepare_8(const Stored<F>* in, int64_t n, uint16_t* out, int pieces,
                           int64_t next) {
  const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  float x[16], sum = 0;
  store<HAL_F32>(x, n > 0 ? load_n<F>(in, n < 8 ? n : 8) : set1(0));
  for (int j = 0; j < 8; j++) sum += x[j];
  for (int p = 0; p < pieces; p++) {
    uint16_t h[16];
    store<HAL_BF16>(h, load<HAL_F32>(x));
    store<HAL_F32>(x, sub(load<HAL_F32>(x), load<HAL_BF16>(h)));
    for (int j = 0; j < 8; j++) out[p * next + j] = h[order[j]];
  }
  return sum;
}

template <class X>
static void prepare_bf16(const HalGemm& a, int64_t row, int64_t end) {
  const HalTiles& w = a.w;
  by_dtype(w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    for (int64_t r = row; r < end; r++) {
      for (int64_t g = 0; g < w.s.groups; g++) {
        const Stored<F>* x = (const Stored<F>*)a.x + r * w.s.k + g * w.s.width;
        const int64_t n = group_inputs(w.s, g);
        float sum = 0;
        for (int64_t i = 0; i < X::end(w, n); i += 8) {
          uint16_t* out = piece<X>(a, 0) + X::at(w, r, g, i);
          sum += prepare_8<F>(x + i, n - i, out, X::pieces(a), X::size(a));
        }
        group_sums<X>(a)[r * w.s.groups + g] = sum;
      }
    }
  });
}

HAL_INLINE __m512i pair_at(const uint16_t* x) {
  uint32_t pair;
  __builtin_memcpy(&pair, x, 4);
  return _mm512_set1_epi32((int)pair);
}

HAL_INLINE vf dot(vf acc, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}

// bf16(i - center) for i = 0 .. 31. vpermw looks at the low five bits of a lane; with four-bit codes
// the fifth belongs to a neighbour, so the table repeats after 16.
HAL_INLINE __m512i small_table(const HalTiles& w) {
  const float center = w.zero ? 0.0f : (float)(1 << (w.s.bits - 1));
  uint16_t table[32];
  for (int i = 0; i < 32; i++) {
    const float x = (float)(w.s.bits == 4 ? i % 16 : i) - center;
    table[i] = (uint16_t)(bits_as<uint32_t>(x) >> 16);
  }
  return _mm512_loadu_si512(table);
}

// bf16(times * i - center) for i = 0 .. 15, twice.
HAL_INLINE __m512i nibble_table(int times, int center) {
  uint16_t table[32];
  for (int i = 0; i < 32; i++) {
    table[i] = (uint16_t)(bits_as<uint32_t>((float)(times * (i % 16) - center)) >> 16);
  }
  return _mm512_loadu_si512(table);
}

// Scales and zero points of one group of a tile.
struct Columns {
  vf scale[4], zero[4];
};

HAL_INLINE Columns columns_of(const HalTiles& w, int64_t tile, int64_t g) {
  Columns c;
  for (int v = 0; v < 4; v++) {
    c.scale[v] = scale_of(w, tile, g, v);
    c.zero[v] = w.zero ? zero_of(w, tile, g, v) : set1(0);
  }
  return c;
}

// One row: sums += scale * (acc - zero * sum(x)); xsum null = no zero points to take off.
HAL_INLINE void add_scaled(const Columns& c, const float* xsum, const vf acc[4], float* sums) {
  for (int v = 0; v < 4; v++) {
    const vf y = xsum ? _mm512_fnmadd_ps(c.zero[v], set1(*xsum), acc[v]) : acc[v];
    store<HAL_F32>(sums + 16 * v, fma(c.scale[v], y, load<HAL_F32>(sums + 16 * v)));
  }
}

// Lane bits >> 8 p .. of every 16-bit lane, by a byte permutation: on Intel shifts and dot products
// share a port (a dot product keeps it for two cycles) and permutations have one of their own.
HAL_INLINE __m512i shift_bytes(int bits) {
  uint8_t from[64];
  for (int i = 0; i < 64; i++) from[i] = (uint8_t)(i % 8 / 2 * 16 + i % 2 * 8 + bits);
  return _mm512_loadu_si512(from);
}

// Dot products of R rows with one tile, every code decoded in registers. Up to five bits a table
// gives the number; wider codes are a sum of two nibbles with a table each, exact in both.
template <int R, int B>
HAL_INLINE void registers_bf16(const HalTiles& w, const uint16_t* x, const float* xsum,
                               int64_t tile, float* sums) {
  const bool two = B > 5;
  const __m512i low = two ? nibble_table(1, 0) : small_table(w);
  const __m512i high = nibble_table(16, w.zero ? 0 : 1 << (B - 1));
  const __m512i by4 = shift_bytes(4), by8 = shift_bytes(8), by12 = shift_bytes(12);
  const Unpack u = unpack_of(B);
  const uint8_t* in = tile_codes(w, tile, 0);
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g));
    const uint16_t* xg = x + group_start(w.s, g);
    // Two chains a column for one row: four dot products in flight do not hide their latency. Pairs
    // of x outside, columns inside: GCC 12 spills when 4 R broadcasts are alive at once.
    const int S = R == 1 ? 2 : 1;
    vf acc[S][R][4];
    for (int i = 0; i < S * R * 4; i++) acc[i / (R * 4)][i / 4 % R][i % 4] = set1(0);
    for (int64_t k = 0; k < inputs; k += 8, in += 64 * B) {
#pragma GCC unroll 8
      for (int i = 0; i < B; i++) _mm_prefetch((const char*)in + 64 * i + 4096, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int h = 0; h < (B == 4 ? 1 : 2); h++) {
        __m512i codes[4];
        for (int v = 0; v < 4; v++) {
          const uint8_t* block = in + v * 16 * B;
          codes[v] = B == 4 ? _mm512_loadu_si512(block) : unpack(u, block + h * 8 * B);
        }
#pragma GCC unroll 4
        for (int t = 0; t < (B == 4 ? 4 : 2); t++) {
          const int p = B == 4 ? t : h + 2 * t;
          __m512i pair[R];
          for (int r = 0; r < R; r++) pair[r] = pair_at(xg + r * w.kp + k + 2 * p);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) {
            const __m512i c = codes[v];
            const __m512i by = B == 4 ? (t == 1 ? by4 : t == 2 ? by8 : by12) : by8;
            const __m512i at = t ? _mm512_multishift_epi64_epi8(by, c) : c;
            const __m512i q = _mm512_permutexvar_epi16(at, low);
            for (int r = 0; r < R; r++) acc[t % S][r][v] = dot(acc[t % S][r][v], q, pair[r]);
            if (!two) continue;
            const __m512i upper = _mm512_multishift_epi64_epi8(t ? by12 : by4, c);
            const __m512i q2 = _mm512_permutexvar_epi16(upper, high);
            for (int r = 0; r < R; r++) acc[t % S][r][v] = dot(acc[t % S][r][v], q2, pair[r]);
          }
        }
      }
    }
    if (S == 2) {
      for (int v = 0; v < 4; v++) acc[0][0][v] = add(acc[0][0][v], acc[S - 1][0][v]);
    }
    const Columns columns = columns_of(w, tile, g);
    for (int r = 0; r < R; r++) {
      const float* own = xsum ? xsum + r * w.s.groups + g : nullptr;
      add_scaled(columns, own, acc[0][r], sums + r * TILE);
    }
  }
}

template <int B>
static void few_bf16(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const uint16_t* x = piece<RowX>(a, 0) + row * a.w.kp;
  const float* xsum = a.w.zero ? group_sums<RowX>(a) + row * a.w.s.groups : nullptr;
  few_rows(rows, [&](auto r) __attribute__((always_inline)) {
    registers_bf16<decltype(r)::value, B>(a.w, x, xsum, tile, sums);
  });
}

const decltype(Path::block) FEW_BF16[] = {few_bf16<2>, few_bf16<3>, few_bf16<4>, few_bf16<5>,
                                          few_bf16<6>, few_bf16<7>, few_bf16<8>};

// Fast: activations as s8 codes with a scale per group of w, summed as integers. Behind the codes:
// scales [m, groups], then sums of codes [m, groups], which take the zero points off.
static int64_t size_fast(const HalGemm& a) {
  return ((a.m * a.w.kp + 63) & ~(int64_t)63) + 2 * a.m * a.w.s.groups * 4;
}

struct FastX {
  int8_t* codes;
  float *scale, *sum;
};

HAL_INLINE FastX fast_x(const HalGemm& a) {
  int8_t* codes = (int8_t*)a.prepared;
  float* scale = (float*)(codes + ((a.m * a.w.kp + 63) & ~(int64_t)63));
  return {codes, scale, scale + a.m * a.w.s.groups};
}

static void prepare_fast(const HalGemm& a, int64_t row, int64_t end) {
  const HalTiles& w = a.w;
  const FastX to = fast_x(a);
  by_dtype(w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    each_group(w.s, row, end, [&](int64_t g, int64_t at, int64_t n) __attribute__((always_inline)) {
      const Stored<F>* x = (const Stored<F>*)a.x + at;
      int8_t* codes = to.codes + g / w.s.groups * w.kp + group_start(w.s, g % w.s.groups);
      to.scale[g] = act_scale<F>(x, n);
      act_codes<F>(x, n, to.scale[g], codes);
      int32_t sum = 0;
      for (int64_t i = 0; i < n; i++) sum += codes[i];
      for (int64_t i = n; i < padded(n); i++) codes[i] = 0;
      to.sum[g] = (float)sum;
    });
  });
}

HAL_INLINE __m512i four_at(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

template <int R, int B>
HAL_INLINE void rows_fast(const HalTiles& w, const FastX& x, int64_t row, int64_t tile,
                          float* sums) {
  const Unpack u = unpack_of(B);
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t* in = tile_codes(w, tile, 0);
  const int S = R == 1 ? 2 : 1;  // chains a column: more than the latency of a dot product
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g));
    const int8_t* xg = x.codes + row * w.kp + group_start(w.s, g);
    __m512i acc[S][R][4];
    for (int i = 0; i < S * R * 4; i++) acc[i / (R * 4)][i / 4 % R][i % 4] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 8, in += 64 * B) {
#pragma GCC unroll 8
      for (int i = 0; i < B; i++) _mm_prefetch((const char*)in + 64 * i + 4096, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          if (B != 4) {
            codes[v] = unpack(u, in + (2 * v + h) * 8 * B);
            continue;
          }
          const __m512i both = _mm512_loadu_si512(in + 64 * v);
          codes[v] = _mm512_and_si512(h ? _mm512_srli_epi16(both, 4) : both, nibble);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512i four = four_at(xg + r * w.kp + k + 4 * h);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) {
            acc[h % S][r][v] = _mm512_dpbusd_epi32(acc[h % S][r][v], codes[v], four);
          }
        }
      }
    }
    for (int v = 0; v < 4; v++) {
      const vf scale = scale_of(w, tile, g, v), zero = zero_of(w, tile, g, v);
      for (int r = 0; r < R; r++) {
        if (S == 2) acc[0][r][v] = _mm512_add_epi32(acc[0][r][v], acc[S - 1][r][v]);
        const int64_t at = (row + r) * w.s.groups + g;
        const vf dots = _mm512_cvtepi32_ps(acc[0][r][v]);
        const vf y = mul(_mm512_fnmadd_ps(zero, set1(x.sum[at]), dots), set1(x.scale[at]));
        float* c = sums + r * TILE + 16 * v;
        store<HAL_F32>(c, fma(scale, y, load<HAL_F32>(c)));
      }
    }
  }
}

template <int B>
static void block_fast(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const FastX x = fast_x(a);
  for (int64_t m = 0; m < rows; m += FEW) {
    few_rows(rows - m, [&](auto r) __attribute__((always_inline)) {
      rows_fast<decltype(r)::value, B>(a.w, x, row + m, tile, sums + m * TILE);
    });
  }
}

const decltype(Path::block) FAST[] = {block_fast<2>, block_fast<3>, block_fast<4>, block_fast<5>,
                                      block_fast<6>, block_fast<7>, block_fast<8>};

// One block as bf16 pairs in the order of prepared x: out[p] = 16 columns.
HAL_INLINE void decode_block_bf16(const uint8_t* in, int bits, __m512i table, float center,
                                  __m512i out[4]) {
  if (bits == 4) {
    const __m512i codes = _mm512_loadu_si512(in);
    out[0] = _mm512_permutexvar_epi16(codes, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    return;
  }
  uint32_t lanes[2][16];
  block_lanes(in, bits, lanes);
  for (int h = 0; h < 2; h++) {
    if (bits < 6) {
      const __m512i codes = _mm512_loadu_si512(lanes[h]);
      const __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(255));
      out[h] = _mm512_permutexvar_epi16(even, table);
      out[2 + h] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
      continue;
    }
    __m512i x[4];  // small integers: their low 16 bits are zero
    for (int j = 0; j < 4; j++) {
      x[j] = _mm512_castps_si512(sub(byte_of(lanes[h], j), set1(center)));
    }
    out[h] = _mm512_or_si512(_mm512_srli_epi32(x[0], 16), x[2]);
    out[2 + h] = _mm512_or_si512(_mm512_srli_epi32(x[1], 16), x[3]);
  }
}

const int64_t CHUNK_BF16 = 128;  // 16 KB of pairs

// `inputs` of a tile as pairs t[pair][64], with zeros up to a multiple of 32 inputs.
HAL_INLINE void decode_bf16(const HalTiles& w, int64_t tile, int64_t k, int64_t inputs,
                            __m512i table, __m512i* t) {
  const float center = w.zero ? 0.0f : (float)(1 << (w.s.bits - 1));
  const uint8_t* in = tile_codes(w, tile, k);
  int64_t pair = 0;
  for (; pair < inputs / 2; pair += 4) {
    for (int v = 0; v < 4; v++, in += block_bytes(w.s.bits)) {
      __m512i block[4];
      decode_block_bf16(in, w.s.bits, table, center, block);
      for (int p = 0; p < 4; p++) t[(pair + p) * 4 + v] = block[p];
    }
  }
  for (; pair % 16; pair++) {
    for (int v = 0; v < 4; v++) t[pair * 4 + v] = _mm512_setzero_si512();
  }
}

// Calls body(group, first input in the group, inputs, decoded chunk, last chunk of the group).
template <class Body>
HAL_INLINE void each_chunk(const HalTiles& w, int64_t tile, Body body) {
  const __m512i table = small_table(w);
  __m512i t[CHUNK_BF16 / 2 * 4];
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g)), start = group_start(w.s, g);
    for (int64_t i = 0; i < inputs; i += CHUNK_BF16) {
      const int64_t n = inputs - i < CHUNK_BF16 ? inputs - i : CHUNK_BF16;
      decode_bf16(w, tile, start + i, n, table, t);
      body(g, i, n, (const __m512i*)t, i + n == inputs);
    }
  }
}

#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI

template <int R>
HAL_INLINE void multiply_bf16(const uint16_t* x, int64_t ldx, const __m512i* t, int64_t inputs,
                              vf (*acc)[4]) {
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < 4; v++) acc[r][v] = set1(0);
  }
  for (int64_t k = 0; k < inputs; k += 2, t += 4) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const __m512i a = pair_at(x + r * ldx + k);
      acc[r][0] = dot(acc[r][0], t[0], a);
      acc[r][1] = dot(acc[r][1], t[1], a);
      acc[r][2] = dot(acc[r][2], t[2], a);
      acc[r][3] = dot(acc[r][3], t[3], a);
    }
  }
}

static void block_bf16(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  each_chunk(w, tile, [&](int64_t g, int64_t i, int64_t n, const __m512i* t, bool last) {
    const float* xsum = w.zero && last ? group_sums<RowX>(a) + row * w.s.groups + g : nullptr;
    const uint16_t* x = piece<RowX>(a, 0) + RowX::at(w, row, g, i);
    const Columns columns = columns_of(w, tile, g);
    each_rows(rows, [&](auto r, int64_t m) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value;
      vf acc[R][4];
      multiply_bf16<R>(x + m * w.kp, w.kp, t, n, acc);
      for (int q = 0; q < R; q++) {
        const float* own = xsum ? xsum + (m + q) * w.s.groups : nullptr;
        add_scaled(columns, own, acc[q], sums + (m + q) * TILE);
      }
    });
  });
}

#endif
#endif

#if HAL_LEVEL == HAL_LEVEL_AMX

// 16 rows of x times 32 inputs times 16 columns in one instruction. The decoded chunk is already in
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
#pragma GCC unroll 8
    for (int i = 0; i < B; i++) _mm_prefetch((const char*)in + 64 * i + 4096, _MM_HINT_T0);
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

#endif

static Path path_of(const HalGemm& a) {
  const bool bf16 = a.w.s.dtype == HAL_BF16;
  const bool few = a.m <= FEW;
#if HAL_LEVEL >= HAL_LEVEL_AVX512VNNI
  if (a.fast) return {FAST[a.w.s.bits - 2], prepare_fast, size_fast, nullptr, nullptr};
#endif
#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI
  if (few && bf16) {
    return {FEW_BF16[a.w.s.bits - 2], prepare_bf16<RowX>, size_bf16<RowX>, nullptr, nullptr};
  }
#endif
  if (few && a.w.s.bits == 4 && !(HAL_LEVEL == HAL_LEVEL_AMX && bf16)) return {few_f32, prepare_f32, size_f32, nullptr, nullptr};
#if HAL_LEVEL == HAL_LEVEL_AMX
  const bool one_panel = a.m <= 16;
  if (one_panel) {
    return {FEW_AMX[a.w.s.bits - 2], prepare_bf16<PanelX>, size_bf16<PanelX>, nullptr, end_amx};
  }
  return {block_amx, prepare_bf16<PanelX>, size_bf16<PanelX>, begin_amx, end_amx};
#elif HAL_LEVEL == HAL_LEVEL_AVX512VNNI
  if (bf16) return {block_bf16, prepare_bf16<RowX>, size_bf16<RowX>, nullptr, nullptr};
#endif
  (void)bf16;
  return {block_f32, prepare_f32, size_f32, nullptr, nullptr};
}

}  // namespace
