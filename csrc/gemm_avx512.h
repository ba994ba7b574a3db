// SPDX-License-Identifier: Apache-2.0
// AVX-512: 4-bit codes decoded by register tables for up to four rows of x, and bf16 dot products.
#pragma once

namespace {

const int FEW = 4;  // rows served without storing the decoded tile

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

#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI

// bf16: prepared x holds every 8 inputs in the order 0 2 4 6 1 3 5 7, the order in which a shift by
// 0, 4, 8, 12 brings the nibbles of a 16-bit lane out as pairs. Behind the rows: the sum of each
// group, which takes the zero points off (dot(q - z, x) = dot(q, x) - z * sum(x)).
HAL_INLINE float* group_sums(const HalGemm& a) {
  return (float*)((uint8_t*)a.prepared + a.m * a.w.kp * 2);
}

static void prepare_bf16(const HalGemm& a, int64_t row, int64_t end) {
  const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (int64_t r = row; r < end; r++) {
    const uint16_t* x = (const uint16_t*)a.x + r * a.w.s.k;
    uint16_t* out = (uint16_t*)a.prepared + r * a.w.kp;
    for (int64_t g = 0; g < a.w.s.groups; g++) {
      const int64_t n = group_inputs(a.w.s, g);
      const uint16_t* in = x + g * a.w.s.width;
      vf sum = set1(0);
      for (int64_t i = 0; i < n; i += 16) sum = add(sum, load_n<HAL_BF16>(in + i, n - i));
      group_sums(a)[r * a.w.s.groups + g] = fold(sum);
      uint16_t* to = out + group_start(a.w.s, g);
      for (int64_t i = 0; i < padded(n); i += 8, to += 8) {
        for (int j = 0; j < 8; j++) to[j] = i + order[j] < n ? in[i + order[j]] : (uint16_t)0;
      }
    }
  }
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

// sums += scale * (acc - zero * sum(x))
template <int R>
HAL_INLINE void scaled_sums(const HalTiles& w, int64_t tile, int64_t g, const float* xsum,
                            vf (*acc)[4], float* sums) {
  for (int v = 0; v < 4; v++) {
    const vf scale = scale_of(w, tile, g, v);
    const vf zero = w.zero ? zero_of(w, tile, g, v) : set1(0);
    for (int r = 0; r < R; r++) {
      float* c = sums + r * TILE + 16 * v;
      vf y = acc[r][v];
      if (xsum) y = _mm512_fnmadd_ps(zero, set1(xsum[r * w.s.groups]), y);
      store<HAL_F32>(c, fma(scale, y, load<HAL_F32>(c)));
    }
  }
}

template <int R>
HAL_INLINE void nibbles_bf16(const HalTiles& w, const uint16_t* x, const float* xsum, int64_t tile,
                             float* sums) {
  const __m512i table = small_table(w);
  const uint8_t* in = tile_codes(w, tile, 0);
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g));
    const uint16_t* xg = x + group_start(w.s, g);
    vf acc[R][4], more[R][4];  // two chains of one row each hide the latency of the dot product
    for (int v = 0; v < 4; v++) {
      for (int r = 0; r < R; r++) acc[r][v] = more[r][v] = set1(0);
    }
    for (int64_t k = 0; k < inputs; k += 8, in += 256) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const __m512i codes = _mm512_loadu_si512(in + 64 * v);
        _mm_prefetch((const char*)in + 64 * v + 4096, _MM_HINT_T0);
        const __m512i w0 = _mm512_permutexvar_epi16(codes, table);
        const __m512i w1 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        const __m512i w2 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        const __m512i w3 = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
        for (int r = 0; r < R; r++) {
          const uint16_t* xr = xg + r * w.kp + k;
          vf* second = R == 1 ? &more[r][v] : &acc[r][v];
          acc[r][v] = dot(acc[r][v], w0, pair_at(xr));
          *second = dot(*second, w1, pair_at(xr + 2));
          acc[r][v] = dot(acc[r][v], w2, pair_at(xr + 4));
          *second = dot(*second, w3, pair_at(xr + 6));
        }
      }
    }
    if (R == 1) {
      for (int v = 0; v < 4; v++) acc[0][v] = add(acc[0][v], more[0][v]);
    }
    scaled_sums<R>(w, tile, g, xsum ? xsum + g : nullptr, acc, sums);
  }
}

static void few_bf16(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const uint16_t* x = (const uint16_t*)a.prepared + row * a.w.kp;
  const float* xsum = a.w.zero ? group_sums(a) + row * a.w.s.groups : nullptr;
  few_rows(rows, [&](auto r) __attribute__((always_inline)) {
    nibbles_bf16<decltype(r)::value>(a.w, x, xsum, tile, sums);
  });
}

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

template <int R>
HAL_INLINE void multiply_bf16(const uint16_t* x, int64_t ldx, const __m512i* t, int64_t inputs,
                              vf (*acc)[4]) {
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

const int64_t CHUNK_BF16 = 128;  // 16 KB of pairs

static void block_bf16(const HalGemm& a, int64_t tile, int64_t row, int64_t rows, float* sums) {
  const HalTiles& w = a.w;
  const __m512i table = small_table(w);
  const float center = w.zero ? 0.0f : (float)(1 << (w.s.bits - 1));
  const int64_t step = block_bytes(w.s.bits);
  __m512i t[CHUNK_BF16 / 2 * 4];
  for (int64_t g = 0; g < w.s.groups; g++) {
    const int64_t inputs = padded(group_inputs(w.s, g)), start = group_start(w.s, g);
    for (int64_t i = 0; i < inputs; i += CHUNK_BF16) {
      const int64_t n = inputs - i < CHUNK_BF16 ? inputs - i : CHUNK_BF16;
      const uint8_t* in = tile_codes(w, tile, start + i);
      for (int64_t k = 0; k < n / 2; k += 4) {
        for (int v = 0; v < 4; v++, in += step) {
          __m512i block[4];
          decode_block_bf16(in, w.s.bits, table, center, block);
          for (int p = 0; p < 4; p++) t[(k + p) * 4 + v] = block[p];
        }
      }
      // The zero points of a group leave with its last chunk.
      const float* xsum = w.zero && i + n == inputs ? group_sums(a) + row * w.s.groups + g : nullptr;
      const uint16_t* x = (const uint16_t*)a.prepared + row * w.kp + start + i;
      each_rows(rows, [&](auto r, int64_t m) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        vf acc[R][4];
        for (int q = 0; q < R; q++) {
          for (int v = 0; v < 4; v++) acc[q][v] = set1(0);
        }
        multiply_bf16<R>(x + m * w.kp, w.kp, t, n, acc);
        scaled_sums<R>(w, tile, g, xsum ? xsum + m * w.s.groups : nullptr, acc, sums + m * TILE);
      });
    }
  }
}

#endif

static Path path_of(const HalGemm& a) {
  const bool few = a.w.s.bits == 4 && a.m <= FEW;
#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI
  if (a.w.s.dtype == HAL_BF16) return {few ? few_bf16 : block_bf16, prepare_bf16};
#endif
  return {few ? few_f32 : block_f32, prepare_f32};
}

}  // namespace
