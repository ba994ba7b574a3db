// SPDX-License-Identifier: Apache-2.0
// Few rows of activations times a weight in fragment order, on tensor cores: the weight is the
// operand of 16 rows, 8 tokens the other one, so nothing is wasted from 8 tokens on, and one token
// costs no more time than the weight's way through memory.
//
// Codes minus their zero level are integers below 256, exact in bf16 and f16: a group's sum is of
// exact products in f32, and its scale comes after it. A warp takes a tile of 16 rows and every
// WARPS-th chunk of 128 columns; sums of the warps are added first to last.
//
// Fragment order of a chunk of a tile. Lane l holds rows l / 4 and l / 4 + 8; of columns 16 j .. 16 j
// + 15 (step j of 8) it holds 4 (l % 4) .. + 3, two pairs of neighbours. The 16 pairs of a row lie in
// planes of 4, 2 and 1 bits (as in 6 = 4 + 2; 8 bits are one plane): first of a pair in the low, second
// in the high half of a word. That is BITS words a row, 2 BITS a lane; lanes' words lie by fours (the
// last two alone), so that a warp reads whole lines.
#pragma once
#include "device.cuh"
#include "qgemm.h"

namespace hal_cuda {

constexpr int ROWS = 16, CHUNK = 128, STEP = 16, STEPS = CHUNK / STEP, LANES = 32, WARPS = 8;

HAL_DEVICE float load_float(const void* at, int64_t i, int dtype) {
  return dtype == FLOAT_F32 ? F32::load(at, i)
         : dtype == FLOAT_BF16 ? Bf16::load(at, i)
                               : F16::load(at, i);
}

template <int COUNT>
struct Words {
  uint32_t w[COUNT];
};

// All words of a lane in a chunk that begins at `at`.
template <int COUNT>
HAL_DEVICE Words<COUNT> load_words(const uint32_t* at, int lane) {
  Words<COUNT> v;
#pragma unroll
  for (int i = 0; i + 4 <= COUNT; i += 4) {
    const Words4 four = stream4(at + i * LANES + lane * 4);
#pragma unroll
    for (int j = 0; j < 4; j++) v.w[i + j] = four.w[j];
  }
  if constexpr (COUNT % 4 != 0) {
    const Words2 two = stream2(at + (COUNT - 2) * LANES + lane * 2);
    v.w[COUNT - 2] = two.w[0];
    v.w[COUNT - 1] = two.w[1];
  }
  return v;
}

template <int WIDTH>
HAL_DEVICE uint32_t plane_pair(const uint32_t* plane, int i) {
  constexpr int per = 16 / WIDTH;
  constexpr uint32_t mask = ((1u << WIDTH) - 1) * 0x10001u;
  return plane[i / per] >> (WIDTH * (i % per)) & mask;
}

// Pair `i` of a row: one code in each half.
template <int BITS>
HAL_DEVICE uint32_t code_pair(const uint32_t* row, int i) {
  if constexpr (BITS == 8) return plane_pair<8>(row, i);
  uint32_t v = 0;
  if constexpr ((BITS & 4) != 0) v = plane_pair<4>(row, i);
  if constexpr ((BITS & 2) != 0) v |= plane_pair<2>(row + (BITS & 4), i) << (BITS & 4);
  if constexpr ((BITS & 1) != 0) v |= plane_pair<1>(row + (BITS & 6), i) << (BITS & 6);
  return v;
}

// Codes to floats minus the zero level. Below 8 bits (16 with f16) by their bits: 2^7 + code is
// 0x4300 | code in bf16, 2^10 + code is 0x6400 | code in f16.
template <class T, int BITS>
struct Decode;

template <int BITS>
struct Decode<F16, BITS> {
  static HAL_DEVICE uint32_t zero(float z) { return F16::pair(1024 + z, 1024 + z); }
  static HAL_DEVICE uint32_t pair(uint32_t codes, uint32_t zero) {
    return F16::minus(codes | 0x64006400u, zero);
  }
};

template <int BITS>
struct Decode<Bf16, BITS> {
  static HAL_DEVICE uint32_t zero(float z) { return Bf16::pair(128 + z, 128 + z); }
  static HAL_DEVICE uint32_t pair(uint32_t codes, uint32_t zero) {
    return Bf16::minus(codes | 0x43004300u, zero);
  }
};

template <>
struct Decode<Bf16, 8> {
  static HAL_DEVICE float zero(float z) { return 8388608.0f + z; }
  static HAL_DEVICE uint32_t pair(uint32_t codes, float zero) {
    const float low = bits_to_float(0x4B000000u | (codes & 0xFFFFu));
    const float high = bits_to_float(0x4B000000u | codes >> 16);
    return Bf16::pair(low - zero, high - zero);
  }
};

// Four activations of a token, two pairs; zeros past the end.
HAL_DEVICE void load_x(const Product& p, int token, int end, int column, uint32_t (&b)[2]) {
  b[0] = b[1] = 0;
  if (token < end && column < p.k) {
    const uint32_t* at = static_cast<const uint32_t*>(p.x) + ((int64_t)token * p.k + column) / 2;
    b[0] = at[0];
    b[1] = at[1];
  }
}

// A tile of 16 rows times tokens first .. first + 8 TILES, of which those from `end` on are not there.
// GROUP: steps of a group, at most 8.
template <class T, int BITS, int TILES, int GROUP>
HAL_DEVICE void tile_product(const Product& p, int64_t tile, int first, int end,
                             float (*sums)[ROWS * 8 * TILES]) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int row = lane / 4, part = lane % 4;
  const uint32_t* codes = p.codes + tile * p.chunks * 2 * BITS * LANES;
  float total[TILES][4] = {};
  for (int chunk = warp; chunk < p.chunks; chunk += WARPS) {
    const Words<2 * BITS> words = load_words<2 * BITS>(codes + chunk * 2 * BITS * LANES, lane);
#pragma unroll
    for (int start = 0; start < STEPS; start += GROUP) {
      const int column = chunk * CHUNK + start * STEP;
      if (column >= p.k) break;
      const int64_t at = (tile * p.groups + (column >> p.shift)) * ROWS + row;
      const float zero0 = p.zero ? p.zero[at] : 1 << (BITS - 1);
      const float zero8 = p.zero ? p.zero[at + 8] : 1 << (BITS - 1);
      const auto z0 = Decode<T, BITS>::zero(zero0), z8 = Decode<T, BITS>::zero(zero8);
      float dot[TILES][4] = {};
#pragma unroll
      for (int step = start; step < start + GROUP; step++) {
        uint32_t a[4];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          const int i = 2 * step + pair;
          a[2 * pair] = Decode<T, BITS>::pair(code_pair<BITS>(words.w, i), z0);
          a[2 * pair + 1] = Decode<T, BITS>::pair(code_pair<BITS>(words.w + BITS, i), z8);
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          uint32_t b[2];
          load_x(p, first + 8 * t + row, end, chunk * CHUNK + step * STEP + 4 * part, b);
          T::mma(dot[t], a, b);
        }
      }
      const float s0 = load_float(p.scale, at, p.scale_dtype);
      const float s8 = load_float(p.scale, at + 8, p.scale_dtype);
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        total[t][0] += s0 * dot[t][0];
        total[t][1] += s0 * dot[t][1];
        total[t][2] += s8 * dot[t][2];
        total[t][3] += s8 * dot[t][3];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = 8 * t + 2 * part + i % 2;
      sums[warp][token * ROWS + row + i / 2 * 8] = total[t][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * 8 * TILES; i += WARPS * LANES) {
    const int token = first + i / ROWS;
    const int64_t column = (p.offsets ? tile % p.expert_tiles : tile) * ROWS + i % ROWS;
    if (token >= end || column >= p.n) continue;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[w][i];
    if (p.bias) sum += load_float(p.bias, column, p.bias_dtype);
    T::store(p.out, (int64_t)token * p.n + column, sum);
  }
}

// One block: a tile of 16 rows, with every gridDim.y-th 8 TILES of the tokens: all, or the expert's.
template <class T, int BITS, int TILES, int GROUP>
HAL_DEVICE void product(const Product& p, float (*sums)[ROWS * 8 * TILES]) {
  const int64_t tile = blockIdx.x;
  int first = 0, end = p.m;
  if (p.offsets) {
    const int64_t expert = tile / p.expert_tiles;
    first = p.offsets[expert];
    end = p.offsets[expert + 1];
  }
  for (first += blockIdx.y * 8 * TILES; first < end; first += gridDim.y * 8 * TILES) {
    tile_product<T, BITS, TILES, GROUP>(p, tile, first, end, sums);
    __syncthreads();  // the sums are read before the next are written
  }
}

// The dense weight [n, k], rounded to T: one warp a chunk of a tile.
template <class T, int BITS>
HAL_DEVICE void decode(const Product& p) {
  const int lane = threadIdx.x % LANES, row = lane / 4, part = lane % 4;
  const int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / LANES;
  const int64_t tile = unit / p.chunks, chunk = unit % p.chunks;
  if (tile * ROWS >= p.n) return;
  const Words<2 * BITS> words = load_words<2 * BITS>(p.codes + unit * 2 * BITS * LANES, lane);
#pragma unroll
  for (int i = 0; i < 2 * STEPS; i++) {
    const int64_t column = chunk * CHUNK + i / 2 * STEP + 4 * part + i % 2 * 2;
    if (column >= p.k) break;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t n = tile * ROWS + row + 8 * half;
      if (n >= p.n) continue;
      const int64_t at = (tile * p.groups + (column >> p.shift)) * ROWS + row + 8 * half;
      const float s = load_float(p.scale, at, p.scale_dtype);
      const float zero = p.zero ? p.zero[at] : 1 << (BITS - 1);
      const uint32_t codes = code_pair<BITS>(words.w + half * BITS, i);
      const uint32_t v =
          T::pair(s * ((float)(codes & 0xFFFFu) - zero), s * ((float)(codes >> 16) - zero));
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + n * p.k + column) = v;
    }
  }
}

}  // namespace hal_cuda
