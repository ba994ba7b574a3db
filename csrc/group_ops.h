// SPDX-License-Identifier: Apache-2.0
// Group-wise verbs: search, qdq, qdq_step, quantize, dequantize. Every operation stands in the
// order of hal/codec.py: true division, no fused multiply-add (-ffp-contract=off), 16-lane sums.
// Each needs one sweep over a group whatever its length, so nothing is buffered.
#pragma once
#include "vec.h"

namespace {

struct Group {
  float scale, zero, low, high;
  bool floored;
};

HAL_INLINE float clamped(float x, float least, float most) {
  return x < least ? least : x > most ? most : x;
}

HAL_INLINE float sign(float x) { return (float)((x > 0) - (x < 0)); }

// codec.scale_zero of one group.
HAL_INLINE Group group_of(const HalShape& s, float amin, float amax, float lo, float hi) {
  Group g;
  const float levels = (float)(1 << s.bits), half = levels / 2, top = levels - 1;
  g.low = -(amin * lo);
  g.high = amax * hi;
  const float larger = g.low > g.high ? g.low : g.high;
  const float exact =
      s.symmetric ? (g.high < g.low ? larger : -larger) / half : (g.high + g.low) / top;
  const float stored = rounded(exact, s.scale_dtype);
  g.floored = (stored < 0 ? -stored : stored) < s.least;
  g.scale = !g.floored ? stored : stored < 0 ? -s.least : s.least;
  g.zero = s.symmetric ? half : clamped(first(rne(set1(g.low / g.scale))), 0, top);
  return g;
}

HAL_INLINE Group group_of(const HalShape& s, const HalParams& p, int64_t i) {
  return group_of(s, p.amin[i], p.amax[i], p.lo[i], p.hi[i]);
}

struct Levels {
  vf q, ratio;
  vm inside;
};

// codec.levels of 16 weights.
HAL_INLINE Levels levels_of(vf w, vf v, vf scale, vf zero, vf top) {
  Levels l;
  l.ratio = div(w, scale);
  const vf raw = add(rne(add(l.ratio, v)), zero);
  l.q = min(max(raw, set1(0)), top);
  l.inside = eq(raw, l.q);
  return l;
}

HAL_INLINE vf top_level(const HalShape& s) { return set1((float)((1 << s.bits) - 1)); }

// Calls body(group index, offset of its first element, elements) for the groups of rows.
template <class Body>
HAL_INLINE void each_group(const HalShape& s, int64_t row, int64_t end, Body body) {
  for (int64_t r = row; r < end; r++) {
    for (int64_t g = 0; g < s.groups; g++) {
      const int64_t k = g * s.width, left = s.k - k;
      body(r * s.groups + g, r * s.k + k, left < s.width ? left : s.width);
    }
  }
}

template <int F>
HAL_INLINE void range_of(const Stored<F>* w, int64_t n, float* amin, float* amax) {
  vf low = set1(0), high = set1(0);
  for (int64_t i = 0; i < n; i += 16) {
    const vf x = load_n<F>(w + i, n - i);
    low = min(low, x);
    high = max(high, x);
  }
  float a[16], b[16];
  store<HAL_F32>(a, low);
  store<HAL_F32>(b, high);
  for (int i = 1; i < 16; i++) {
    a[0] = a[i] < a[0] ? a[i] : a[0];
    b[0] = b[i] > b[0] ? b[i] : b[0];
  }
  *amin = a[0];
  *amax = b[0];
}

template <int F>
HAL_INLINE float error_of(const Stored<F>* w, const float* importance, int64_t n, const Group& g,
                          vf top) {
  const vf scale = set1(g.scale), zero = set1(g.zero);
  vf sum = set1(0);
  for (int64_t i = 0; i < n; i += 16) {
    const vf x = load_n<F>(w + i, n - i);
    const vf q = levels_of(x, set1(0), scale, zero, top).q;
    const vf e = sub(mul(scale, sub(q, zero)), x);
    vf square = mul(e, e);
    if (importance) square = mul(square, load_n<HAL_F32>(importance + i, n - i));
    sum = add(sum, square);
  }
  return fold(sum);
}

static void search_rows(const HalSearch* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    const Stored<F>* w = (const Stored<F>*)a->w;
    each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n) {
      float amin, amax, best = 1, least = __builtin_inff();
      range_of<F>(w + at, n, &amin, &amax);
      const float* importance = a->importance ? a->importance + at % a->s.k : nullptr;
      for (int64_t c = 0; c < a->n_factors; c++) {
        const float f = a->factors[c];
        const Group group = group_of(a->s, amin * f, amax * f, 1, 1);
        const float error = error_of<F>(w + at, importance, n, group, top_level(a->s));
        if (error < least) {
          least = error;
          best = f;
        }
      }
      a->amin[g] = amin * best;
      a->amax[g] = amax * best;
    });
  });
}

static void qdq_rows(const HalQdq* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    const Stored<F>* w = (const Stored<F>*)a->w;
    Stored<F>* out = (Stored<F>*)a->out;
    const float* v = a->p.v;
    each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n) {
      const Group group = group_of(a->s, a->p, g);
      const vf scale = set1(group.scale), zero = set1(group.zero), top = top_level(a->s);
      for (int64_t i = 0; i < n; i += 16) {
        const vf offset = v ? load_n<HAL_F32>(v + at + i, n - i) : set1(0);
        const Levels l = levels_of(load_n<F>(w + at + i, n - i), offset, scale, zero, top);
        store_n<F>(out + at + i, mul(scale, sub(l.q, zero)), n - i);
      }
    });
  });
}

// The two sums of a group that the range needs: d loss / d scale, and the gradient that clipping
// sends to the zero point. Moves v on the way.
template <int F, int H>
HAL_INLINE void step_sums(const HalStep& a, const Group& group, int64_t at, int64_t n, float* by_q,
                          float* clipped) {
  const Stored<F>* w = (const Stored<F>*)a.w + at;
  const Stored<H>* grad = (const Stored<H>*)a.grad + at;
  float* v = a.p.v ? a.p.v + at : nullptr;
  const vf scale = set1(group.scale), zero = set1(group.zero), top = top_level(a.s), none = set1(0);
  const vf up = set1(sign(group.scale) * a.lr_v), down = set1(-(sign(group.scale) * a.lr_v));
  vf sum_q = none, sum_clipped = none;
  for (int64_t i = 0; i < n; i += 16) {
    const vf g = load_n<H>(grad + i, n - i);
    const vf old = v ? load_n<HAL_F32>(v + i, n - i) : none;
    const Levels l = levels_of(load_n<F>(w + i, n - i), old, scale, zero, top);
    sum_q = add(sum_q, mul(g, sub(sub(l.q, zero), select(l.inside, l.ratio, none))));
    sum_clipped = add(sum_clipped, select(l.inside, none, g));
    if (v) {
      const vf move = select(lt(none, g), up, select(lt(g, none), down, none));
      store_n<HAL_F32>(v + i, sub(old, select(l.inside, move, none)), n - i);
    }
  }
  *by_q = fold(sum_q);
  *clipped = fold(sum_clipped);
}

// codec.qdq_step_ after the sums: signs of d loss / d lo and d loss / d hi, then the step.
HAL_INLINE void move_range(const HalStep& a, const Group& g, int64_t i, float by_scale,
                           float clipped) {
  const float amin = a.p.amin[i], amax = a.p.amax[i], top = (float)((1 << a.s.bits) - 1);
  float d_lo, d_hi;
  if (a.s.symmetric) {
    by_scale = g.floored ? 0 : by_scale;
    d_lo = (g.high < g.low ? by_scale : g.high == g.low ? -by_scale : 0) * -amin;
    d_hi = (g.high < g.low ? 0 : -by_scale) * amax;
  } else {
    const float by_zero = -(g.scale * clipped);
    by_scale = g.floored ? 0 : by_scale - by_zero * (g.low / (g.scale * g.scale));
    d_lo = -amin * by_scale / top - by_zero * amin / g.scale;
    d_hi = amax * by_scale / top;
  }
  a.p.lo[i] = clamped(a.p.lo[i] - sign(d_lo) * a.lr_range, 0, 1);
  a.p.hi[i] = clamped(a.p.hi[i] - sign(d_hi) * a.lr_range, 0, 1);
}

static void step_rows(const HalStep* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    by_dtype(a->grad_dtype, [&](auto grad) __attribute__((always_inline)) {
      each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n) {
        const Group group = group_of(a->s, a->p, g);
        float by_q, clipped;
        step_sums<decltype(dtype)::value, decltype(grad)::value>(*a, group, at, n, &by_q,
                                                                 &clipped);
        move_range(*a, group, g, by_q, clipped);
      });
    });
  });
}

static void quantize_rows(const HalPlain* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    const Stored<F>* w = (const Stored<F>*)a->w;
    const float* v = a->p.v;
    each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n) {
      const Group group = group_of(a->s, a->p, g);
      const vf scale = set1(group.scale), zero = set1(group.zero), top = top_level(a->s);
      for (int64_t i = 0; i < n; i += 16) {
        const vf offset = v ? load_n<HAL_F32>(v + at + i, n - i) : set1(0);
        const Levels l = levels_of(load_n<F>(w + at + i, n - i), offset, scale, zero, top);
        store_codes_n(a->codes + at + i, l.q, n - i);
      }
      store_float(a->scale, g, group.scale, a->s.scale_dtype);
      if (a->zero) a->zero[g] = (uint8_t)group.zero;
    });
  });
}

static void dequantize_rows(const HalPlain* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    Stored<F>* out = (Stored<F>*)a->out;
    each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n) {
      const vf scale = set1(first(load_any(a->scale, g, 1, a->s.scale_dtype)));
      const vf zero = set1(a->zero ? (float)a->zero[g] : (float)(1 << (a->s.bits - 1)));
      for (int64_t i = 0; i < n; i += 16) {
        const vf q = load_codes_n(a->codes + at + i, n - i);
        store_n<F>(out + at + i, mul(scale, sub(q, zero)), n - i);
      }
    });
  });
}

// codec.quantize_act of one group: n activations to codes by `scale`.
template <int F>
HAL_INLINE void act_codes(const Stored<F>* x, int64_t n, float scale, int8_t* codes) {
  uint8_t* out = (uint8_t*)codes;
  for (int64_t i = 0; i < n; i += 16) {
    const vf q = rne(div(load_n<F>(x + i, n - i), set1(scale)));
    const vf level = add(min(max(q, set1(-127)), set1(127)), set1(128));
    store_codes_n(out + i, level, n - i);
  }
  for (int64_t i = 0; i < n; i++) out[i] ^= 128;
}

template <int F>
HAL_INLINE float act_scale(const Stored<F>* x, int64_t n) {
  float low, high;
  range_of<F>(x, n, &low, &high);
  const float most = high > -low ? high : -low, scale = most / 127;
  return scale == 0 ? 1 : scale;
}

static void quantize_act_rows(const HalAct* a, int64_t row, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    each_group(a->s, row, end, [&](int64_t g, int64_t at, int64_t n)
                                   __attribute__((always_inline)) {
      const Stored<F>* x = (const Stored<F>*)a->x + at;
      if (!a->given) a->scale[g] = act_scale<F>(x, n);
      act_codes<F>(x, n, a->scale[g], a->codes + at);
    });
  });
}

}  // namespace
