// SPDX-License-Identifier: Apache-2.0
// The 16 lanes of group_ops.h as the threads of a team: every thread has one lane of a vector, and
// all have the same scalars. What differs between compilers comes before this file is included:
//
//   int team_lane();                   this thread's lane, 0 .. 15
//   float team_at(float x, int lane);  x of that lane
//   float team_xor(float x, int bit);  x of the lane whose index differs by this bit
//   bool team_any(bool x);             whether any lane says so
#pragma once
#include "floats.h"

#define HAL_FMA 1
#define HAL_LEVEL (-1)  // below those of vec.h: no CPU

namespace {

struct vf {  // no plain float: math.h has functions of the same names for those
  float own;
};
typedef bool vm;

const int ABREAST = 4;

HAL_INLINE vf set1(float x) { return {x}; }
HAL_INLINE float first(vf a) { return team_at(a.own, 0); }
HAL_INLINE vf add(vf a, vf b) { return {a.own + b.own}; }
HAL_INLINE vf sub(vf a, vf b) { return {a.own - b.own}; }
HAL_INLINE vf mul(vf a, vf b) { return {a.own * b.own}; }
HAL_INLINE vf div(vf a, vf b) { return {a.own / b.own}; }
HAL_INLINE vf fma(vf a, vf b, vf c) { return {fmaf(a.own, b.own, c.own)}; }
HAL_INLINE vf fnma(vf a, vf b, vf c) { return {fmaf(-a.own, b.own, c.own)}; }
HAL_INLINE vf rne(vf a) { return {rintf(a.own)}; }
HAL_INLINE vm lt(vf a, vf b) { return a.own < b.own; }
HAL_INLINE vm eq(vf a, vf b) { return a.own == b.own; }
HAL_INLINE vf select(vm m, vf a, vf b) { return m ? a : b; }
HAL_INLINE vf min(vf a, vf b) { return select(lt(a, b), a, b); }
HAL_INLINE vf max(vf a, vf b) { return select(lt(b, a), a, b); }
HAL_INLINE vf minus_if(vm m, vf a, vf b) { return select(m, sub(a, b), a); }
HAL_INLINE vf plus_if(vm m, vf a, vf b) { return select(m, add(a, b), a); }
HAL_INLINE vm lt_if(vm m, vf a, vf b) { return m && lt(a, b); }
HAL_INLINE bool any_nan(vf a) { return team_any(a.own != a.own); }
HAL_INLINE bool all_usual(vf a) {
  const uint32_t size = bits_as<uint32_t>(a.own) & 0x7fffffff;
  return !team_any(size - (27u << 23) >= 200u << 23);
}

// Zeros of both signs are equal to `min` and `max`: the first lane's word counts, so that all agree.
HAL_INLINE float least(vf a) {
  for (int bit = 8; bit; bit /= 2) a = min(a, {team_xor(a.own, bit)});
  return first(a);
}
HAL_INLINE float most(vf a) {
  for (int bit = 8; bit; bit /= 2) a = max(a, {team_xor(a.own, bit)});
  return first(a);
}
// A sum is the same in either order, so every lane gets what lane 0 does in vec.h.
HAL_INLINE float fold(vf a) {
  for (int bit = 8; bit; bit /= 2) a.own += team_xor(a.own, bit);
  return a.own;
}

struct Lanes {
  vf all;
};
HAL_INLINE Lanes lanes_of(vf x) { return {x}; }
HAL_INLINE vf vector_of(const Lanes& l) { return l.all; }
HAL_INLINE float lane(const Lanes& l, int64_t i) { return team_at(l.all.own, (int)i); }
HAL_INLINE void set_lane(Lanes& l, int64_t i, float x) {
  if (team_lane() == i) l.all.own = x;
}

template <int C>
HAL_INLINE void set_folds(Lanes (&l)[C], int64_t i, const vf (&x)[C]) {
  for (int c = 0; c < C; c++) set_lane(l[c], i, fold(x[c]));
}

// One copy of the body: lanes past the end are switched off by its loads and stores.
template <class Body>
HAL_INLINE void each_vector(int64_t n, Body body) {
#pragma unroll 4
  for (int i = 0; i < (int)n; i += 16) body((int64_t)i, n - i);
}

template <class T>
HAL_INLINE void ahead(const T*) {}

HAL_INLINE float widened(float x, int) { return x; }
HAL_INLINE float widened(uint16_t x, int f) {
  return f == HAL_F16 ? from_f16(x) : bits_as<float>((uint32_t)x << 16);
}
HAL_INLINE uint16_t narrowed(float x, int f) { return f == HAL_F16 ? to_f16(x) : to_bf16(x); }
HAL_INLINE void put(float* p, float x, int) { *p = x; }
HAL_INLINE void put(uint16_t* p, float x, int f) { *p = narrowed(x, f); }

template <int F>
HAL_INLINE vf load_n(const Stored<F>* p, int64_t n) {
  return {team_lane() < n ? widened(p[team_lane()], F) : 0};
}
template <int F>
HAL_INLINE vf load(const Stored<F>* p) {
  return load_n<F>(p, 16);
}
template <int F>
HAL_INLINE void store_n(Stored<F>* p, vf x, int64_t n) {
  if (team_lane() < n) put(p + team_lane(), x.own, F);
}
template <int F>
HAL_INLINE void store_normal_n(Stored<F>* p, vf x, int64_t n) {
  store_n<F>(p, x, n);
}
HAL_INLINE vf load_codes_n(const uint8_t* p, int64_t n) {
  return {team_lane() < n ? (float)p[team_lane()] : 0};
}
HAL_INLINE void store_low_bytes_n(uint8_t* p, vf x, int64_t n) {
  if (team_lane() < n) p[team_lane()] = (uint8_t)bits_as<uint32_t>(x.own);
}

HAL_INLINE vf rounded(vf x, int f) {
  return f == HAL_F32 ? x : set1(widened(narrowed(x.own, f), f));
}
HAL_INLINE void store_float(void* p, int64_t i, float x, int f) {
  if (f == HAL_F32) put((float*)p + i, x, f);
  else put((uint16_t*)p + i, x, f);
}
HAL_INLINE vf load_any(const void* p, int64_t i, int64_t n, int f) {
  if (f == HAL_F32) return load_n<HAL_F32>((const float*)p + i, n);
  if (f == HAL_BF16) return load_n<HAL_BF16>((const uint16_t*)p + i, n);
  return load_n<HAL_F16>((const uint16_t*)p + i, n);
}

}  // namespace
