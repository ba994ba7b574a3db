// SPDX-License-Identifier: Apache-2.0
// What stands between the products of a decoder block: norms, attention over a cache, the gate. Sums
// and softmax in f32; every result that a tensor of the model would hold is rounded to its dtype, so
// the numbers are those of the plain model but for the order of sums.
#pragma once
#include "vec.h"

namespace {

HAL_INLINE float inverse_root(float mean, float eps) { return 1 / __builtin_sqrtf(mean + eps); }

// x after a round trip through dtype F, all lanes.
template <int F>
HAL_INLINE vf round_to(vf x) {
  if constexpr (F == HAL_F32) return x;
  Stored<F> part[16];
  store<F>(part, x);
  return load<F>(part);
}

template <int F>
HAL_INLINE float sum_of_squares(const Stored<F>* x, int64_t n) {
  vf sum = set1(0);
  for (int64_t i = 0; i < n; i += 16) {
    const vf a = load_n<F>(x + i, n - i);
    sum = fma(a, a, sum);
  }
  return fold(sum);
}

template <int F>
HAL_INLINE void norm_row(Stored<F>* x, const Stored<F>* more, const Stored<F>* weight, int64_t k,
                         float eps, Stored<F>* out) {
  if (more) {
    for (int64_t i = 0; i < k; i += 16) {
      store_n<F>(x + i, add(load_n<F>(x + i, k - i), load_n<F>(more + i, k - i)), k - i);
    }
  }
  const vf r = set1(inverse_root(sum_of_squares<F>(x, k) / (float)k, eps));
  for (int64_t i = 0; i < k; i += 16) {
    const vf y = round_to<F>(mul(load_n<F>(x + i, k - i), r));
    store_n<F>(out + i, mul(load_n<F>(weight + i, k - i), y), k - i);
  }
}

static void norm_rows(const HalNorm* a, int64_t row, int64_t end) {
  by_dtype(a->dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    typedef Stored<F> T;
    for (int64_t r = row; r < end; r++) {
      const T* more = a->more ? (const T*)a->more + r * a->k : nullptr;
      norm_row<F>((T*)a->x + r * a->k, more, (const T*)a->weight, a->k, a->eps,
                  (T*)a->out + r * a->k);
    }
  });
}

// exp, relative error below 3e-7 where it is normal; 0 below -87 and infinity above 88, where softmax
// and gate have nothing to lose. x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial in r.
HAL_INLINE vf exp_of(vf x) {
  const vf v = min(max(x, set1(-87.0f)), set1(88.0f));
  const vf n = rne(mul(v, set1(1.44269504f)));
  const vf r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), v));
  vf p = set1(1.98756915e-4f);
  p = fma(p, r, set1(1.39819995e-3f));
  p = fma(p, r, set1(8.33345205e-3f));
  p = fma(p, r, set1(4.16657962e-2f));
  p = fma(p, r, set1(1.66666657e-1f));
  p = fma(p, r, set1(0.5f));
  p = add(fma(mul(p, r), r, r), set1(1.0f));
  float power[16];
  store<HAL_F32>(power, n);
  for (int i = 0; i < 16; i++) power[i] = bits_as<float>(((int32_t)power[i] + 127) << 23);
  const vf y = mul(p, load<HAL_F32>(power));
  return select(lt(x, set1(-87.0f)), set1(0), select(lt(set1(88.0f), x), set1(__builtin_inff()), y));
}

static void gate_rows(const HalGate* a, int64_t row, int64_t end) {
  by_dtype(a->dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    typedef Stored<F> T;
    for (int64_t r = row; r < end; r++) {
      const T *gate = (const T*)a->x + r * 2 * a->n, *up = gate + a->n;
      T* out = (T*)a->out + r * a->n;
      for (int64_t i = 0; i < a->n; i += 16) {
        const vf x = load_n<F>(gate + i, a->n - i);
        const vf silu = round_to<F>(div(x, add(set1(1), exp_of(sub(set1(0), x)))));
        store_n<F>(out + i, mul(silu, load_n<F>(up + i, a->n - i)), a->n - i);
      }
    }
  });
}

enum { BLOCK = 32, MOST_DIM = 256, MOST_HEADS = 4 };

// A head as f32: normed where there is a norm, rotated to its position.
template <int F>
HAL_INLINE void rotated(const HalAttend& a, const Stored<F>* x, const void* norm, int64_t position,
                        float* out) {
  typedef Stored<F> T;
  const int64_t half = a.dim / 2;
  const T *cos = (const T*)a.cos + position * a.dim, *sin = (const T*)a.sin + position * a.dim;
  const vf r =
      set1(norm ? inverse_root(sum_of_squares<F>(x, a.dim) / (float)a.dim, a.eps) : 1.0f);
  float y[MOST_DIM];
  for (int64_t i = 0; i < a.dim; i += 16) {
    vf v = load<F>(x + i);
    if (norm) v = round_to<F>(mul(load<F>((const T*)norm + i), round_to<F>(mul(v, r))));
    store<HAL_F32>(y + i, v);
  }
  for (int64_t i = 0; i < a.dim; i += 16) {
    const vf v = load<HAL_F32>(y + i);
    const vf other = i < half ? sub(set1(0), load<HAL_F32>(y + i + half))
                              : load<HAL_F32>(y + i - half);
    const vf one = round_to<F>(mul(v, load<F>(cos + i)));
    const vf two = round_to<F>(mul(other, load<F>(sin + i)));
    store<HAL_F32>(out + i, round_to<F>(add(one, two)));
  }
}

// s[g][t] = q[g] . key t, for G heads that share keys [length / 32, dim, 32].
template <int F, int G>
HAL_INLINE void scores_of(const HalAttend& a, const Stored<F>* keys, const float* q, int64_t count,
                          float* s) {
  for (int64_t t = 0; t < count; t += BLOCK) {
    vf sum[G][2];
    for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = set1(0);
    for (int64_t d = 0; d < a.dim; d++) {
      const vf low = load<F>(keys + t * a.dim + d * BLOCK);
      const vf high = load<F>(keys + t * a.dim + d * BLOCK + 16);
      for (int g = 0; g < G; g++) {
        const vf x = set1(q[g * a.dim + d]);
        sum[g][0] = fma(x, low, sum[g][0]);
        sum[g][1] = fma(x, high, sum[g][1]);
      }
    }
    for (int g = 0; g < G; g++) {
      store<HAL_F32>(s + g * a.length + t, sum[g][0]);
      store<HAL_F32>(s + g * a.length + t + 16, sum[g][1]);
    }
  }
}

// Shares of the positions, times their sum, in place; returns the sum.
HAL_INLINE float softmax(float* s, int64_t count, float scale) {
  const int64_t end = (count + 15) / 16 * 16;
  for (int64_t t = count; t < end; t++) s[t] = -__builtin_inff();
  vf high = load<HAL_F32>(s), sum = set1(0);
  for (int64_t t = 16; t < end; t += 16) high = max(high, load<HAL_F32>(s + t));
  float lanes[16], most;
  store<HAL_F32>(lanes, high);
  most = lanes[0];
  for (int i = 1; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
  for (int64_t t = 0; t < end; t += 16) {
    const vf p = exp_of(mul(sub(load<HAL_F32>(s + t), set1(most)), set1(scale)));
    store<HAL_F32>(s + t, p);
    sum = add(sum, p);
  }
  return fold(sum);
}

// out[g] = sum over t of s[g][t] * value t / total[g], 16 * C columns at a time.
template <int F, int G, int C>
HAL_INLINE void mix(const HalAttend& a, const Stored<F>* values, const float* s,
                    const float* total, int64_t count, Stored<F>* out) {
  for (int64_t d = 0; d < a.dim; d += 16 * C) {
    vf sum[G][C];
    for (int g = 0; g < G; g++) {
      for (int c = 0; c < C; c++) sum[g][c] = set1(0);
    }
    for (int64_t t = 0; t < count; t++) {
      for (int c = 0; c < C; c++) {
        const vf v = load<F>(values + t * a.dim + d + 16 * c);
        for (int g = 0; g < G; g++) sum[g][c] = fma(set1(s[g * a.length + t]), v, sum[g][c]);
      }
    }
    for (int g = 0; g < G; g++) {
      for (int c = 0; c < C; c++) {
        store<F>(out + g * a.dim + d + 16 * c, div(sum[g][c], set1(total[g])));
      }
    }
  }
}

// G query heads from `head` on, all rows.
template <int F, int G>
HAL_INLINE void attend_group(const HalAttend& a, int64_t head, const Stored<F>* keys,
                             const Stored<F>* values, float* s) {
  typedef Stored<F> T;
  const int64_t wide = (a.heads + 2 * a.kv_heads) * a.dim;
  float q[G * MOST_DIM], total[G];
  for (int64_t row = 0; row < a.m; row++) {
    const T* x = (const T*)a.qkv + row * wide + head * a.dim;
    const int64_t count = a.at + row + 1;
    for (int g = 0; g < G; g++) {
      rotated<F>(a, x + g * a.dim, a.q_norm, a.at + row, q + g * a.dim);
    }
    scores_of<F, G>(a, keys, q, count, s);
    for (int g = 0; g < G; g++) total[g] = softmax(s + g * a.length, count, a.scale);
    T* out = (T*)a.out + row * a.heads * a.dim + head * a.dim;
    if (a.dim % 64 == 0) mix<F, G, 4>(a, values, s, total, count, out);
    else mix<F, G, 2>(a, values, s, total, count, out);
  }
}

template <int F>
HAL_INLINE void attend_head(const HalAttend& a, int64_t kv) {
  typedef Stored<F> T;
  const int64_t wide = (a.heads + 2 * a.kv_heads) * a.dim, group = a.heads / a.kv_heads;
  T* keys = (T*)a.keys + kv * a.length * a.dim;
  T* values = (T*)a.values + kv * a.length * a.dim;
  for (int64_t row = 0; row < a.m; row++) {
    const T* k = (const T*)a.qkv + row * wide + (a.heads + kv) * a.dim;
    const int64_t position = a.at + row;
    float rotated_key[MOST_DIM];
    rotated<F>(a, k, a.k_norm, position, rotated_key);
    T* slot = keys + position / BLOCK * BLOCK * a.dim + position % BLOCK;
    for (int64_t d = 0; d < a.dim; d += 16) {
      T part[16];
      store<F>(part, load<HAL_F32>(rotated_key + d));
      for (int i = 0; i < 16; i++) slot[(d + i) * BLOCK] = part[i];
      store<F>(values + position * a.dim + d, load<F>(k + a.kv_heads * a.dim + d));
    }
  }
  float* s = a.scores + kv * MOST_HEADS * a.length;
  int64_t head = kv * group, left = group;
  for (; left >= 4; left -= 4, head += 4) attend_group<F, 4>(a, head, keys, values, s);
  if (left >= 2) {
    attend_group<F, 2>(a, head, keys, values, s);
    left -= 2;
    head += 2;
  }
  if (left) attend_group<F, 1>(a, head, keys, values, s);
}

static void attend_heads(const HalAttend* a, int64_t kv, int64_t end) {
  by_dtype(a->dtype, [&](auto dtype) __attribute__((always_inline)) {
    for (int64_t h = kv; h < end; h++) attend_head<decltype(dtype)::value>(*a, h);
  });
}

}  // namespace
