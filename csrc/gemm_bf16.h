// SPDX-License-Identifier: Apache-2.0
// bf16 dot products over a decoded chunk of a tile (AVX512-BF16), and the forms of x that they and
// AMX read.
#pragma once

namespace {

// Prepared x holds every 8 inputs in the order 0 2 4 6 1 3 5 7, the order in which a shift by 0, 4, 8, 12
// brings the nibbles of a 16-bit lane out as pairs. Behind it: the sum of x over each chunk [chunks, m],
// which takes the zero points off (dot(q - z, x) = dot(q, x) - z * sum(x)).

// x as rows [m, kp].
struct RowX {
  // Of input i of chunk c of row r.
  static int64_t at(const HalGemm& a, int64_t r, const Chunk& c, int64_t i) {
    return r * a.w.kp + group_start(a.w.s, c.g) + c.i + i;
  }
  static int64_t end(int64_t n) { return n; }
  static int64_t size(const HalGemm& a) { return a.m * a.w.kp; }
  static int pieces(const HalGemm&) { return 1; }
};

template <class X>
HAL_INLINE uint16_t* piece(const HalGemm& a, int i) {
  return (uint16_t*)a.prepared + i * X::size(a);
}
template <class X>
HAL_INLINE float* chunk_sums(const HalGemm& a) {
  return (float*)piece<X>(a, X::pieces(a));
}
template <class X>
static int64_t size_bf16(const HalGemm& a) {
  return X::pieces(a) * X::size(a) * 2 + a.m * row_chunks(a.w) * 4;
}

// n inputs in dot order and zeros up to `room` (both counted to 32), one bf16 a piece, `next` elements
// apart.
template <int F>
HAL_INLINE void prepare_32(const Stored<F>* in, int64_t n, int64_t room, uint16_t* out, int pieces,
                           int64_t next) {
  const __m512i order = _mm512_set_epi64(0x1f001d001b0019, 0x1e001c001a0018, 0x17001500130011,
                                         0x16001400120010, 0x0f000d000b0009, 0x0e000c000a0008,
                                         0x07000500030001, 0x06000400020000);
  if (F == HAL_BF16 && n >= 32) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(in)));
    return;
  }
  const __mmask32 mask = room < 32 ? (1u << room) - 1 : ~0u;
  vf low = n > 0 ? load_n<F>(in, n) : set1(0), high = n > 16 ? load_n<F>(in + 16, n - 16) : set1(0);
  for (int p = 0; p < pieces; p++) {
    alignas(64) uint16_t h[32];
    store<HAL_BF16>(h, low);
    store<HAL_BF16>(h + 16, high);
    low = sub(low, load<HAL_BF16>(h));
    high = sub(high, load<HAL_BF16>(h + 16));
    const __m512i ordered = _mm512_permutexvar_epi16(order, _mm512_load_si512(h));
    _mm512_mask_storeu_epi16(out + p * next, mask, ordered);
  }
}

template <int F>
HAL_INLINE float sum_of(const Stored<F>* x, int64_t n) {
  vf sum = set1(0);
  for (int64_t i = 0; i < n; i += 16) sum = add(sum, load_n<F>(x + i, n - i));
  return fold(sum);
}

template <class X>
static void prepare_bf16(const HalGemm& a, int64_t row, int64_t end) {
  const HalTiles& w = a.w;
  by_dtype(w.s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    for (int64_t r = row; r < end; r++) {
      for (Chunk c = first_chunk(w, 0); c.n; c = next_chunk(w, c)) {
        const Stored<F>* x = (const Stored<F>*)a.x + r * w.s.k + c.g * w.s.width + c.i;
        const int64_t left = group_inputs(w.s, c.g) - c.i, n = left < c.n ? left : c.n;
        for (int64_t i = 0; i < X::end(c.n); i += 32) {
          uint16_t* out = piece<X>(a, 0) + X::at(a, r, c, i);
          prepare_32<F>(x + i, n - i, X::end(c.n) - i, out, X::pieces(a), X::size(a));
        }
        if (w.zero) chunk_sums<X>(a)[c.index * a.m + r] = sum_of<F>(x, n);
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

// bf16(i - center) for i = 0 .. 31. vpermw looks at the low five bits of a lane; in 2 and 4 bits the upper
// ones belong to neighbours, so the table repeats.
HAL_INLINE __m512i small_table(const HalTiles& w) {
  const float center = w.zero ? 0.0f : (float)(1 << (w.s.bits - 1));
  uint16_t table[32];
  for (int i = 0; i < 32; i++) {
    const float x = (float)(w.s.bits < 5 && w.s.bits != 3 ? i % (1 << w.s.bits) : i) - center;
    table[i] = (uint16_t)(bits_as<uint32_t>(x) >> 16);
  }
  return _mm512_loadu_si512(table);
}

// A piece of a step as pairs of bf16 by the table, up to 5 bits: inputs 0 and 2 of its four, then 1 and 3.
template <int B>
HAL_INLINE void table_pairs(const Unpack<B>& u, const uint8_t* step, int piece, __m512i table,
                            __m512i* even, __m512i* odd) {
  if (Piece<B>::fields) {
    const unsigned shift = (unsigned)Piece<B>::shift(piece);
    const __m512i x = _mm512_loadu_si512(step + Piece<B>::bytes(piece));
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, shift), table);
    *odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 8 + shift), table);
    return;
  }
  const __m512i x = u.piece(step, piece);
  *even = _mm512_permutexvar_epi16(_mm512_and_si512(x, _mm512_set1_epi16(255)), table);
  *odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 8), table);
}

// One row: sums += scale * (acc - zero * sum(x)); xsum null = no zero points to take off.
HAL_INLINE void add_scaled(const Columns& c, const float* xsum, const vf acc[4], float* sums) {
  for (int v = 0; v < 4; v++) {
    const vf y = xsum ? _mm512_fnmadd_ps(c.zero[v], set1(*xsum), acc[v]) : acc[v];
    store<HAL_F32>(sums + 16 * v, fma(c.scale[v], y, load<HAL_F32>(sums + 16 * v)));
  }
}

#if HAL_LEVEL == HAL_LEVEL_AVX512VNNI

// Block v of a step as bf16 pairs in the order of prepared x: out[p] = 16 columns.
template <int B>
HAL_INLINE void decode_block_bf16(const Unpack<B>& u, const uint8_t* step, int v, __m512i table,
                                  float center, __m512i out[4]) {
  for (int h = 0; h < 2; h++) {
    if (B < 6) {
      table_pairs(u, step, 2 * v + h, table, out + h, out + 2 + h);
      continue;
    }
    uint32_t lanes[16];
    _mm512_storeu_si512(lanes, u.piece(step, 2 * v + h));
    __m512i x[4];  // small integers: their low 16 bits are zero
    for (int j = 0; j < 4; j++) {
      x[j] = _mm512_castps_si512(sub(byte_of(lanes, j), set1(center)));
    }
    out[h] = _mm512_or_si512(_mm512_srli_epi32(x[0], 16), x[2]);
    out[2 + h] = _mm512_or_si512(_mm512_srli_epi32(x[1], 16), x[3]);
  }
}

// A chunk of a tile as pairs t[pair][64].
template <int B>
static void decode_bf16(const HalTiles& w, const uint8_t* in, int64_t inputs, __m512i table,
                            __m512i* t) {
  const float center = w.zero ? 0.0f : (float)(1 << (w.s.bits - 1));
  const Unpack<B> u;
  for (int64_t pair = 0; pair < inputs / 2; pair += 4, in += step_bytes(B)) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512i block[4];
      decode_block_bf16<B>(u, in, v, table, center, block);
      for (int p = 0; p < 4; p++) t[(pair + p) * 4 + v] = block[p];
    }
  }
}

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
  const __m512i table = small_table(w);
  __m512i t[X_CHUNK / 2 * 4];
  const uint8_t* in = tile_codes(w, tile, 0);
  for (Chunk c = first_chunk(w, 0); c.n; in += c.n * 8 * w.s.bits, c = next_chunk(w, c)) {
    by_bits(w.s.bits, [&](auto bits) { decode_bf16<decltype(bits)::value>(w, in, c.n, table, t); });
    const float* xsum = w.zero ? chunk_sums<RowX>(a) + c.index * a.m + row : nullptr;
    const uint16_t* x = piece<RowX>(a, 0) + RowX::at(a, row, c, 0);
    const Columns columns = columns_of(w, tile, c.g);
    each_rows(rows, [&](auto r, int64_t m) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value;
      vf acc[R][4];
      multiply_bf16<R>(x + m * w.kp, w.kp, t, c.n, acc);
      for (int q = 0; q < R; q++) {
        const float* own = xsum ? xsum + m + q : nullptr;
        add_scaled(columns, own, acc[q], sums + (m + q) * TILE);
      }
    });
  }
}

#endif

}  // namespace
