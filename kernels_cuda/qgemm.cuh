// SPDX-License-Identifier: Apache-2.0
// Few rows of activations times a weight in fragment order, on tensor cores: the weight is the
// operand of 16 rows, 8 tokens the other one, so nothing is wasted from 8 tokens on, and one token
// costs no more time than the weight's way through memory.
//
// Codes minus their zero level are integers below 256, exact in bf16 and f16: a group's sum is of
// exact products in f32, and its scale comes after it. A warp takes a tile of 16 rows and every
// WARPS-th chunk of 128 columns; sums of the warps are added first to last. The codes of its next chunks
// are on their way through shared memory meanwhile (cp.async), its next scales in registers.
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

// Where words are read: each once, past the caches, or from the ring.
struct Streamed {
  static HAL_DEVICE Words4 four(const uint32_t* at) { return stream4(at); }
  static HAL_DEVICE Words2 two(const uint32_t* at) { return stream2(at); }
};
struct Held {
  static HAL_DEVICE Words4 four(const uint32_t* at) { return shared4(at); }
  static HAL_DEVICE Words2 two(const uint32_t* at) { return shared2(at); }
};

// All words of a lane in a chunk that begins at `at`.
template <int COUNT, class From>
HAL_DEVICE Words<COUNT> load_words(const uint32_t* at, int lane) {
  Words<COUNT> v;
#pragma unroll
  for (int i = 0; i + 4 <= COUNT; i += 4) {
    const Words4 four = From::four(at + i * LANES + lane * 4);
#pragma unroll
    for (int j = 0; j < 4; j++) v.w[i + j] = four.w[j];
  }
  if constexpr (COUNT % 4 != 0) {
    const Words2 two = From::two(at + (COUNT - 2) * LANES + lane * 2);
    v.w[COUNT - 2] = two.w[0];
    v.w[COUNT - 1] = two.w[1];
  }
  return v;
}

// A warp's next chunks. A lane copies the words that it reads itself, so none waits for another.
template <int BITS>
struct Ring {
  static constexpr int STAGES = BITS <= 4 ? 4 : BITS == 5 ? 3 : 2;  // with the sums, 48 KB at most
  static constexpr int COUNT = 2 * BITS;                            // words of a lane in a chunk
  uint32_t stages[STAGES][COUNT * LANES];

  HAL_DEVICE void begin(int stage, const uint32_t* at, int lane) {
    uint32_t* to = stages[stage];
#pragma unroll
    for (int i = 0; i + 4 <= COUNT; i += 4) {
      copy<4>(to + i * LANES + lane * 4, at + i * LANES + lane * 4);
    }
    if constexpr (COUNT % 4 != 0) {
      const int last = (COUNT - 2) * LANES + lane * 2;
      copy<2>(to + last, at + last);
    }
  }

  HAL_DEVICE Words<COUNT> words(int stage, int lane) const {
    return load_words<COUNT, Held>(stages[stage], lane);
  }
};

// What the warps of a block share.
template <int BITS, int TILES>
struct Shared {
  Ring<BITS> rings[WARPS];
  float sums[WARPS][ROWS * 8 * TILES];
};

// Scales and zero levels of a lane's two rows for the COUNT groups of a chunk, as they are stored: to
// make numbers of them here would be to wait for them.
template <int COUNT>
struct Scales {
  uint32_t scale[COUNT][2];
  uint8_t zero[COUNT][2];
};

template <int BITS, int GROUP>
HAL_DEVICE Scales<STEPS / GROUP> load_scales(const Product& p, int64_t tile, int chunk, int row) {
  Scales<STEPS / GROUP> v;
#pragma unroll
  for (int g = 0; g < STEPS / GROUP; g++) {
    const int column = chunk * CHUNK + g * GROUP * STEP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      v.scale[g][half] = 0;
      v.zero[g][half] = 1 << (BITS - 1);
      if (column >= p.k) continue;
      const int64_t at = (tile * p.groups + (column >> p.shift)) * ROWS + row + 8 * half;
      v.scale[g][half] = p.scale_dtype == FLOAT_F32 ? static_cast<const uint32_t*>(p.scale)[at]
                                                    : static_cast<const uint16_t*>(p.scale)[at];
      if (p.zero) v.zero[g][half] = p.zero[at];
    }
  }
  return v;
}

HAL_DEVICE float number(uint32_t bits, int dtype) {
  return dtype == FLOAT_F32    ? bits_to_float(bits)
         : dtype == FLOAT_BF16 ? Bf16::number((uint16_t)bits)
                               : F16::number((uint16_t)bits);
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
                             Shared<BITS, TILES>& shared) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int row = lane / 4, part = lane % 4;
  const uint32_t* codes = p.codes + tile * p.chunks * 2 * BITS * LANES;
  Ring<BITS>& ring = shared.rings[warp];
  constexpr int STAGES = Ring<BITS>::STAGES;
  const auto begin = [&](int chunk, int stage) {
    if (chunk < p.chunks) ring.begin(stage, codes + chunk * 2 * BITS * LANES, lane);
    commit();
  };
  for (int s = 0; s < STAGES - 1; s++) begin(warp + s * WARPS, s);
  constexpr bool EARLY = GROUP >= 4;  // scales of narrower groups would take the registers of others
  Scales<STEPS / GROUP> next;
  if constexpr (EARLY) next = load_scales<BITS, GROUP>(p, tile, warp, row);
  float total[TILES][4] = {};
  int stage = 0;
  for (int chunk = warp; chunk < p.chunks; chunk += WARPS) {
    begin(chunk + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
    arrived<STAGES - 1>();
    const Words<2 * BITS> words = ring.words(stage, lane);
    stage = (stage + 1) % STAGES;
    if constexpr (!EARLY) next = load_scales<BITS, GROUP>(p, tile, chunk, row);
    const Scales<STEPS / GROUP> scales = next;
    if constexpr (EARLY) next = load_scales<BITS, GROUP>(p, tile, chunk + WARPS, row);
#pragma unroll
    for (int start = 0; start < STEPS; start += GROUP) {
      if (chunk * CHUNK + start * STEP >= p.k) break;
      const auto z0 = Decode<T, BITS>::zero(scales.zero[start / GROUP][0]);
      const auto z8 = Decode<T, BITS>::zero(scales.zero[start / GROUP][1]);
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
      const float s0 = number(scales.scale[start / GROUP][0], p.scale_dtype);
      const float s8 = number(scales.scale[start / GROUP][1], p.scale_dtype);
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
      shared.sums[warp][token * ROWS + row + i / 2 * 8] = total[t][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * 8 * TILES; i += WARPS * LANES) {
    const int token = first + i / ROWS;
    const int64_t column = (p.offsets ? tile % p.expert_tiles : tile) * ROWS + i % ROWS;
    if (token >= end || column >= p.n) continue;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += shared.sums[w][i];
    if (p.bias) sum += load_float(p.bias, column, p.bias_dtype);
    T::store(p.out, (int64_t)token * p.n + column, sum);
  }
}

// One block: a tile of 16 rows, with every gridDim.y-th 8 TILES of the tokens: all, or the expert's.
template <class T, int BITS, int TILES, int GROUP>
HAL_DEVICE void product(const Product& p, Shared<BITS, TILES>& shared) {
  const int64_t tile = blockIdx.x;
  int first = 0, end = p.m;
  if (p.offsets) {
    const int64_t expert = tile / p.expert_tiles;
    first = p.offsets[expert];
    end = p.offsets[expert + 1];
  }
  for (first += blockIdx.y * 8 * TILES; first < end; first += gridDim.y * 8 * TILES) {
    tile_product<T, BITS, TILES, GROUP>(p, tile, first, end, shared);
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
  const auto words = load_words<2 * BITS, Streamed>(p.codes + unit * 2 * BITS * LANES, lane);
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
