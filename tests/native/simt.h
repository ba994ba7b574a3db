// SPDX-License-Identifier: Apache-2.0
// A GPU's threads on the host, for tests: what kernels_cuda/device.cuh offers, with the same meaning.
// A thread is a fiber; a block's fibers take turns, and wait for their warp at a tensor-core product,
// for their half of it where they exchange numbers, and for their block at __syncthreads. Says nothing
// of races or of speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

#define HAL_DEVICE inline

namespace simt {

struct Index {
  int x, y, z;
};

// A copy that is under way: its place holds nothing until the thread has waited for it.
struct Copy {
  uint32_t* to;
  const uint32_t* from;
  int words;
};

enum State { RUNS, AT_TEAM, AT_WARP, AT_BLOCK, DONE };

// What the threads of a warp hand in for a product of [16, 16] and [16, 8].
struct Offer {
  float* d;
  const uint32_t *a, *b;
  float (*number)(uint16_t);
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  State state = RUNS;
  Offer offer;
  float given, shown[16];  // to the team; by all of the team
  std::vector<Copy> open;  // begun since the last commit
  std::deque<std::vector<Copy>> batches;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline Index thread, block, grid;

inline void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline float at(const Offer& o, bool b, int pair, int half) {
  return o.number((uint16_t)((b ? o.b : o.a)[pair] >> 16 * half));
}

// Fragments of m16n8k16: element (row, k) of a is with lane row % 8 * 4 + k % 8 / 2, in register
// row / 8 + 2 (k / 8), half k % 2; (k, n) of b with lane n * 4 + k % 8 / 2, register k / 8.
inline void multiply(Fiber* warp) {
  for (int row = 0; row < 16; row++) {
    for (int n = 0; n < 8; n++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) {
        const Offer& a = warp[row % 8 * 4 + k % 8 / 2].offer;
        const Offer& b = warp[n * 4 + k % 8 / 2].offer;
        sum += at(a, false, row / 8 + 2 * (k / 8), k % 2) * at(b, true, k / 8, k % 2);
      }
      warp[row % 8 * 4 + n / 2].offer.d[n % 2 + 2 * (row / 8)] += sum;
    }
  }
}

// Once all of a team have given a number, each sees the numbers of all.
inline void exchange(Fiber* team) {
  for (int i = 0; i < 16; i++) {
    if (team[i].state != AT_TEAM) return;
  }
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 16; j++) team[i].shown[j] = team[j].given;
    team[i].state = RUNS;
  }
}

template <class Body>
void run_block(int threads, Body& body) {
  static std::vector<Fiber> fibers(threads);  // all blocks of a body have as many
  static Body* entered;
  entered = &body;
  for (Fiber& f : fibers) {
    f.state = RUNS;
    f.open.clear();
    f.batches.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = 1 << 16;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, +[]() { (*entered)(); current->state = DONE; }, 0);
  }
  for (int done = 0; done < threads;) {
    for (int i = 0; i < threads; i++) {
      if (fibers[i].state != RUNS) continue;
      current = &fibers[i];
      thread = {i, 0, 0};
      swapcontext(&scheduler, &current->context);
    }
    for (int t = 0; t < threads; t += 16) exchange(&fibers[t]);
    done = 0;
    int blocked = 0;
    for (int w = 0; w < threads; w += 32) {
      int waiting = 0;
      for (int i = w; i < w + 32; i++) waiting += fibers[i].state == AT_WARP;
      if (waiting == 32) {
        multiply(&fibers[w]);
        for (int i = w; i < w + 32; i++) fibers[i].state = RUNS;
      }
    }
    for (Fiber& f : fibers) {
      blocked += f.state == AT_BLOCK;
      done += f.state == DONE;
    }
    if (blocked == threads) {
      for (Fiber& f : fibers) f.state = RUNS;
    }
  }
}

// Calls body() in every thread of every block.
template <class Body>
void run(Index blocks, int threads, Body body) {
  grid = blocks;
  for (int y = 0; y < grid.y; y++) {
    for (int x = 0; x < grid.x; x++) {
      block = {x, y, 0};
      run_block(threads, body);
    }
  }
}

}  // namespace simt

#define threadIdx simt::thread
#define blockIdx simt::block
#define gridDim simt::grid

inline void __syncthreads() { simt::wait(simt::AT_BLOCK); }

inline int team_lane() { return threadIdx.x % 16; }

inline const float* team_numbers(float own) {
  simt::current->given = own;
  simt::wait(simt::AT_TEAM);
  return simt::current->shown;
}

inline float team_at(float x, int lane) { return team_numbers(x)[lane]; }
inline float team_xor(float x, int bit) { return team_numbers(x)[team_lane() ^ bit]; }
inline bool team_any(bool x) {
  const float* all = team_numbers(x);
  for (int i = 0; i < 16; i++) {
    if (all[i] != 0) return true;
  }
  return false;
}

struct Words4 {
  uint32_t w[4];
};

struct Words2 {
  uint32_t w[2];
};

inline Words4 stream4(const uint32_t* at) { return {{at[0], at[1], at[2], at[3]}}; }
inline Words2 stream2(const uint32_t* at) { return {{at[0], at[1]}}; }

template <int COUNT>
void copy(uint32_t* to, const uint32_t* from) {
  memset(to, 0xA5, COUNT * 4);
  simt::current->open.push_back({to, from, COUNT});
}

inline void commit() {
  simt::current->batches.push_back(std::move(simt::current->open));
  simt::current->open.clear();
}

template <int LATE>
void arrived() {
  auto& batches = simt::current->batches;
  for (; batches.size() > LATE; batches.pop_front()) {
    for (const simt::Copy& c : batches.front()) memcpy(c.to, c.from, c.words * 4);
  }
}

inline Words4 shared4(const uint32_t* at) { return {{at[0], at[1], at[2], at[3]}}; }
inline Words2 shared2(const uint32_t* at) { return {{at[0], at[1]}}; }

inline float bits_to_float(uint32_t v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t v;
  memcpy(&v, &f, 4);
  return v;
}

// A 16-bit float by its two conversions; round half to even.
template <class T>
struct Narrow {
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt::current->offer = {d, a, b, T::number};
    simt::wait(simt::AT_WARP);
  }
  static uint32_t pair(float low, float high) {
    return T::bits(low) | (uint32_t)T::bits(high) << 16;
  }
  static uint32_t minus(uint32_t a, uint32_t b) {
    return pair(T::number((uint16_t)a) - T::number((uint16_t)b),
                T::number((uint16_t)(a >> 16)) - T::number((uint16_t)(b >> 16)));
  }
  static float load(const void* at, int64_t i) {
    return T::number(static_cast<const uint16_t*>(at)[i]);
  }
  static void store(void* at, int64_t i, float v) { static_cast<uint16_t*>(at)[i] = T::bits(v); }
};

struct Bf16 : Narrow<Bf16> {
  static float number(uint16_t v) { return bits_to_float((uint32_t)v << 16); }
  static uint16_t bits(float f) {
    const uint32_t v = float_to_bits(f);
    return (uint16_t)((v + 0x7FFF + (v >> 16 & 1)) >> 16);
  }
};

struct F16 : Narrow<F16> {
  static float number(uint16_t v) {
    const int exponent = v >> 10 & 31;
    const float fraction = (float)(v & 1023);
    const float size =
        exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return v >> 15 ? -size : size;
  }
  static uint16_t bits(float f) {
    const uint16_t sign = (uint16_t)(float_to_bits(f) >> 16 & 0x8000);
    const float size = fabsf(f);
    if (size == 0) return sign;
    int exponent;
    frexpf(size, &exponent);
    const int scale = exponent < -13 ? -24 : exponent - 11;  // of the last place
    const float places = nearbyintf(ldexpf(size, -scale));
    if (scale == -24) return (uint16_t)(sign | (uint16_t)places);
    const int whole = ((scale + 24) << 10) + (int)places;  // carries into the exponent
    return (uint16_t)(sign | (whole > 0x7C00 ? 0x7C00 : whole));
  }
};
