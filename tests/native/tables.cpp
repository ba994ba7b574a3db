// SPDX-License-Identifier: Apache-2.0
// Runs every verb of every table that this machine selects on numbers made here, and prints a line a
// verb and case: "table verb case hash" where bits are part of the contract, the relative error
// against f64 for products. tests/native/test_machines.py compares the lines of different machines.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "../../csrc/dispatch.h"

namespace {

struct Random {
  uint64_t state = 88172645463325252ull;
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
  }
  float normal() {  // sum of four: exact in f32, the same everywhere
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (int32_t)(next() >> 12) - (1 << 19);
    return (float)sum / (float)(1 << 19);
  }
};

float value(const void* p, int64_t i, int dtype) {
  if (dtype == HAL_F32) return ((const float*)p)[i];
  const uint16_t h = ((const uint16_t*)p)[i];
  if (dtype == HAL_F16) {
    const float size = ldexpf((float)((h & 1023) | 1024), (h >> 10 & 31) - 25);
    return h >> 15 ? -size : size;  // normal numbers only
  }
  const uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

typedef std::vector<uint8_t> Bytes;

Bytes numbers(Random& r, int64_t n, int dtype) {
  Bytes out((size_t)n * 4 + 64);
  for (int64_t i = 0; i < n; i++) {
    const float x = r.normal();
    uint32_t u;
    memcpy(&u, &x, 4);
    if (dtype == HAL_F32) memcpy(&out[(size_t)i * 4], &u, 4);
    const uint16_t h = dtype == HAL_BF16 ? (uint16_t)(u >> 16)
                                         : (uint16_t)((u >> 16 & 0x8000) | (14 << 10) | (u & 1023));
    if (dtype != HAL_F32) memcpy(&out[(size_t)i * 2], &h, 2);
  }
  return out;
}

uint64_t hash(const void* p, size_t n) {
  uint64_t h = 14695981039346656037ull;
  for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t*)p)[i]) * 1099511628211ull;
  return h;
}

struct Case {
  HalShape s;
  char name[64];
};

std::vector<Case> cases() {
  const int64_t shapes[][3] = {{5, 200, 32}, {70, 256, 128}, {3, 100, 100}, {33, 96, 20}};
  std::vector<Case> all;
  for (int bits = 2; bits <= 8; bits++) {
    for (int i = 0; i < 4; i++) {
      const int symmetric = (bits + i) % 2, dtype = (bits + i) % 3, scale = (bits + 2 * i) % 3;
      const int64_t n = shapes[i][0], k = shapes[i][1], width = shapes[i][2];
      const float least = scale == HAL_F32 ? 1e-8f : scale == HAL_BF16 ? 0x1.5p-17f : 0x1.5p-17f;
      Case c = {{n, k, width, (k + width - 1) / width, bits, symmetric, dtype, scale, least}, {}};
      snprintf(c.name, sizeof c.name, "%c%d:g%d:%d:%d", symmetric ? 's' : 'u', bits, (int)width,
               dtype, scale);
      all.push_back(c);
    }
  }
  return all;
}

struct Runner {
  const HalTable& t;
  const Case& c;

  void line(const char* verb, const void* p, size_t n) const {
    printf("%s %s %s %016llx\n", t.name, verb, c.name, (unsigned long long)hash(p, n));
  }

  // |scale| and so on of what was quantized; x [m, k] times it against f64.
  void multiply(const HalTiles& tiles, const HalPlain& p, int64_t m, int32_t way, Random& r) const {
    const HalShape& s = c.s;
    const Bytes x = numbers(r, m * s.k, s.dtype);
    Bytes out((size_t)(m * s.n) * 4 + 64, 0xa5);
    HalGemm a = {};
    a.w = tiles;
    a.m = m;
    a.n = s.n;
    a.x = x.data();
    a.out = out.data();
    a.ldo = s.n;
    a.way = way;
    Bytes prepared((size_t)t.prepared_bytes(&a) + 64);
    a.prepared = (void*)(((uintptr_t)prepared.data() + 63) & ~(uintptr_t)63);
    t.prepare_x(&a, 0, m);
    t.gemm(&a, 0, tiles.tiles);
    double wrong = 0, size = 0;
    for (int64_t row = 0; row < m; row++) {
      for (int64_t n = 0; n < s.n; n++) {
        double want = 0;
        for (int64_t k = 0; k < s.k; k++) {
          const int64_t g = n * s.groups + k / s.width;
          const double zero = p.zero ? p.zero[g] : 1 << (s.bits - 1);
          want += (double)value(x.data(), row * s.k + k, s.dtype) *
                  (double)value(p.scale, g, s.scale_dtype) * (p.codes[n * s.k + k] - zero);
        }
        const double got = (double)value(out.data(), row * s.n + n, s.dtype);
        wrong += (got - want) * (got - want);
        size += want * want;
      }
    }
    printf("%s %s-m%d %s %.3g\n", t.name, way == HAL_FAST ? "fast" : "gemm", (int)m, c.name,
           sqrt(wrong / size));
  }

  void run() const {
    Random r;
    const HalShape& s = c.s;
    const size_t size = (size_t)(s.n * s.k), groups = (size_t)(s.n * s.groups);
    const Bytes w = numbers(r, s.n * s.k, s.dtype), grad = numbers(r, s.n * s.k, HAL_BF16);
    std::vector<float> amin(groups), amax(groups), lo(groups, 0.9f), hi(groups, 0.8f), v(size);
    for (float& x : v) x = r.normal() / 4;
    const float factors[] = {1, 0.5f, 0.8f, 0.9f, 1.1f, 1.5f};
    const HalSearch search = {s, w.data(), nullptr, factors, 6, amin.data(), amax.data()};
    t.search(&search, 0, groups);
    line("search-min", amin.data(), groups * 4);
    line("search-max", amax.data(), groups * 4);

    const HalParams params = {v.data(), lo.data(), hi.data(), amin.data(), amax.data()};
    const size_t width = s.dtype == HAL_F32 ? 4 : 2, scale_width = s.scale_dtype == HAL_F32 ? 4 : 2;
    Bytes out(size * 4 + 64);
    const HalQdq qdq = {s, w.data(), params, out.data()};
    t.qdq(&qdq, 0, groups);
    line("qdq", out.data(), size * width);
    const HalStep step = {s, w.data(), grad.data(), HAL_BF16, params, 0.01f, 0.02f};
    t.qdq_step(&step, 0, groups);
    line("step-v", v.data(), size * 4);
    line("step-lo", lo.data(), groups * 4);
    line("step-hi", hi.data(), groups * 4);

    Bytes codes(size + 64), scale(groups * 4 + 64), zero(groups + 64), back(size + 64);
    HalPlain p = {s, codes.data(), scale.data(), s.symmetric ? nullptr : zero.data(), params,
                  w.data(), out.data()};
    p.p.v = nullptr;
    t.quantize(&p, 0, groups);
    line("codes", codes.data(), size);
    line("scale", scale.data(), groups * scale_width);
    t.dequantize(&p, 0, groups);
    line("dequantize", out.data(), size * width);
    std::vector<float> act_scale(groups);
    const HalAct act = {s, w.data(), (int8_t*)back.data(), act_scale.data(), 0};
    t.quantize_act(&act, 0, groups);
    line("act-codes", back.data(), size);
    line("act-scale", act_scale.data(), groups * 4);
    if (s.k % 32 == 0) {
      Bytes words(size * 4 + 64);
      const HalRepack pack = {s, HAL_GPTQ, codes.data(), (uint32_t*)words.data()};
      t.pack(&pack, 0, s.k / 32);
      line("gptq", words.data(), size / 8 * (size_t)s.bits);
      const HalRepack unpack = {s, HAL_GPTQ, back.data(), (uint32_t*)words.data()};
      t.unpack(&unpack, 0, s.k / 32);
      printf("%s gptq-back %s %d\n", t.name, c.name, !memcmp(back.data(), codes.data(), size));
    }

    const int64_t padded = (s.width + 7) / 8 * 8, last = s.k - (s.groups - 1) * s.width;
    HalTiles tiles = {s, (s.groups - 1) * padded + (last + 7) / 8 * 8, (s.n + 63) / 64, nullptr,
                      nullptr, nullptr};
    const size_t bytes = (size_t)(tiles.tiles * 64 * tiles.kp / 8 * s.bits);
    const size_t columns = (size_t)(tiles.tiles * s.groups * 64);
    Bytes tiled(bytes + 4096), tiled_scale(columns * 4), tiled_zero(columns);
    tiles.codes = tiled.data();
    tiles.scale = tiled_scale.data();
    tiles.zero = s.symmetric ? nullptr : tiled_zero.data();
    t.tile(&tiles, &p, 0, tiles.tiles);
    line("tiles", tiled.data(), bytes);
    HalPlain again = p;
    memset(back.data(), 0xa5, size);
    Bytes scale_back(groups * 4 + 64), zero_back(groups + 64);
    again.codes = back.data();
    again.scale = scale_back.data();
    again.zero = zero_back.data();
    t.untile(&tiles, &again, 0, tiles.tiles);
    printf("%s tiles-back %s %d\n", t.name, c.name, !memcmp(back.data(), codes.data(), size));
    const int64_t ms[] = {1, 2, 4, 9};
    for (const int64_t m : ms) multiply(tiles, p, m, HAL_EXACT, r);
    for (int64_t m = 1; m < 5; m++) multiply(tiles, p, m, HAL_FAST, r);
  }
};

}  // namespace

int main() {
  const hal::Tables& found = hal::tables();
  for (int i = 0; i < found.count; i++) {
    printf("table %s\n", found.rows[i]->name);
    for (const Case& c : cases()) Runner{*found.rows[i], c}.run();
  }
  return 0;
}
