// SPDX-License-Identifier: Apache-2.0
// Group-wise verbs: search, qdq, qdq_step, quantize, dequantize, quantize_act. Every result has the
// bits of hal/codec.py: true division, no fused multiply-add (-ffp-contract=off), 16-lane sums.
//
// A vector division takes 16 cycles on AVX-512, longer than all the rest together. Where a fused
// multiply-add is at hand quotients come from the reciprocal instead, with the same bits (`quotient`).
//
// The bodies know 16 lanes: of a vector on CPUs (vec.h), the threads of a team on GPUs (team.h).
#pragma once
#ifdef HAL_TEAM
#include "team.h"
#else
#include "vec.h"
#endif

namespace {

HAL_INLINE vf sign(vf x) {
  return select(lt(set1(0), x), set1(1), select(lt(x, set1(0)), set1(-1), set1(0)));
}

HAL_INLINE vf clamped(vf x, vf least, vf most) {
  return select(lt(x, least), least, select(lt(most, x), most, x));
}

HAL_INLINE vf negative(vf x) { return sub(set1(0), x); }

// Adding 1.5 * 2^23 to a number below 2^22 rounds it to an integer, half to even, and leaves that
// integer in the low bits; whatever is larger stays far outside of any range of levels.
const float MAGIC = 12582912.0f;

// Up to 16 groups, one a lane: codec.scale_zero of each.
struct Groups {
  vf low, high, scale, zero;
  vm floored;
};

HAL_INLINE Groups groups_of(const HalShape& s, vf amin, vf amax, vf lo, vf hi) {
  Groups g;
  const float levels = (float)(1 << s.bits), half = levels / 2, top = levels - 1;
  const float part = 1 / half;  // a power of two: the product is the quotient
  g.low = negative(mul(amin, lo));
  g.high = mul(amax, hi);
  const vf larger = max(g.low, g.high);
  const vf exact = s.symmetric ? mul(select(lt(g.high, g.low), larger, negative(larger)), set1(part))
                               : div(add(g.high, g.low), set1(top));
  const vf stored = rounded(exact, s.scale_dtype), least = set1(s.least);
  const vm down = lt(stored, set1(0));
  g.floored = lt(select(down, negative(stored), stored), least);
  g.scale = select(g.floored, select(down, negative(least), least), stored);
  g.zero = s.symmetric ? set1(half) : clamped(rne(div(g.low, g.scale)), set1(0), set1(top));
  return g;
}

const int BATCH = 16;

// What elements need to know of their groups. low, high: MAGIC + the first and the last level, counted
// from zero.
struct Batch {
  Lanes scale, inverse, zero, low, high;
  bool usual, twice;  // every |scale| in [2^-100, 2^100); see quotient
};

HAL_INLINE Batch batch_of(const HalShape& s, const Groups& g) {
  Batch b;
  b.scale = lanes_of(g.scale);
  b.inverse = lanes_of(div(set1(1), g.scale));
  b.zero = lanes_of(g.zero);
  const vf low = sub(set1(MAGIC), g.zero);
  b.low = lanes_of(low);
  b.high = lanes_of(add(low, set1((float)((1 << s.bits) - 1))));
#if HAL_FMA
  b.usual = all_usual(g.scale);
#else
  b.usual = false;
#endif
  b.twice = s.scale_dtype == HAL_F32;
  return b;
}

// Groups i .. i + n (at most BATCH of them).
HAL_INLINE Groups groups_at(const HalShape& s, const HalParams& p, int64_t i, int64_t n) {
  return groups_of(s, load_n<HAL_F32>(p.amin + i, n), load_n<HAL_F32>(p.amax + i, n),
                   load_n<HAL_F32>(p.lo + i, n), load_n<HAL_F32>(p.hi + i, n));
}

// One group of a batch.
struct Grid {
  vf scale, inverse, zero, low, high;
  bool usual, twice;
};

HAL_INLINE Grid grid_of(const Batch& b, int64_t i) {
  return {set1(lane(b.scale, i)), set1(lane(b.inverse, i)), set1(lane(b.zero, i)),
          set1(lane(b.low, i)),   set1(lane(b.high, i)),    b.usual,
          b.twice};
}

// a / scale correctly rounded, for usual scales; NaN if it overflows; less exact for |a| < 2^-100,
// where remainders are. The product with the reciprocal is corrected by its remainder (Markstein
// 1990), after which 2^-46 of it may be missing. That decides no rounding where the scale has 11 bits
// (a quotient is at least 2^-36 of itself away from the middle of two floats); for 24 bits, once more.
#if HAL_FMA
HAL_INLINE vf quick_quotient(vf a, const Grid& g, bool twice) {
  const vf first = mul(a, g.inverse);
  const vf q = fma(fnma(first, g.scale, a), g.inverse, first);
  return twice ? fma(fnma(q, g.scale, a), g.inverse, q) : q;
}
#endif

HAL_INLINE vf quotient(vf a, const Grid& g) {
#if HAL_FMA
  if (g.usual && all_usual(a)) return quick_quotient(a, g, g.twice);
#endif
  return div(a, g.scale);
}

// How to divide: truly, or by so many corrections.
template <int Corrections>
struct Way {
  static const int corrections = Corrections;
};

// Weights of F (8 or 11 bits) over scales of 11: a quotient is the middle of two levels, or 2^-12 away
// from it and more. Counted in steps of 2^-14 (the last place of a float at FINE) the product with the
// reciprocal is on the same side of every middle below 256 as the quotient, or on it: nothing is to be
// corrected.
const float FINE = 768.0f;
template <int F>
const bool has_short_way = HAL_FMA && F != HAL_F32;
template <int F, class W>
const bool short_way = has_short_way<F> && W::corrections == 1;

// MAGIC + level - zero of 16 weights of F, without offset; NaN for corrected quotients past the end of f32.
template <int F, class W>
HAL_INLINE vf raw_level(vf w, const Grid& g, W) {
#if HAL_FMA
  if constexpr (short_way<F, W>) return add(fma(w, g.inverse, set1(FINE)), set1(MAGIC - FINE));
  if constexpr (W::corrections != 0) {
    return add(quick_quotient(w, g, W::corrections == 2), set1(MAGIC));
  }
#endif
  return add(div(w, g.scale), set1(MAGIC));
}

HAL_INLINE vf clipped(vf raw, const Grid& g) { return min(max(raw, g.low), g.high); }

// Calls body(way to divide) and, if it answers with a NaN, once more with true divisions.
template <class Body>
HAL_INLINE void divided(const Grid& g, Body body) {
#if HAL_FMA
  if (g.usual && !any_nan(g.twice ? body(Way<2>()) : body(Way<1>()))) return;
#endif
  (void)g;
  body(Way<0>());
}

struct Levels {
  vf level, ratio;  // MAGIC + q - zero
  vm inside;
};

// codec.levels of 16 weights.
HAL_INLINE Levels levels_of(vf w, vf v, const Grid& g) {
  Levels l;
  l.ratio = quotient(w, g);
  const vf raw = add(add(l.ratio, v), set1(MAGIC));
  l.level = clipped(raw, g);
  l.inside = eq(raw, l.level);
  return l;
}

// Calls body(first group, groups) for batches of some groups.
template <class Body>
HAL_INLINE void each_batch(int64_t from, int64_t end, Body body) {
  for (int64_t i = from; i < end; i += BATCH) body(i, end - i < BATCH ? end - i : BATCH);
}

// Calls body(j, offset of its first element, elements) for groups first + j, j < count.
template <class Body>
HAL_INLINE void each_of(const HalShape& s, int64_t first, int64_t count, Body body) {
  int64_t r = first / s.groups, g = first % s.groups;
  for (int64_t j = 0; j < count; j++) {
    const int64_t k = g * s.width, left = s.k - k;
    body(j, r * s.k + k, left < s.width ? left : s.width);
    if (++g == s.groups) {
      g = 0;
      r++;
    }
  }
}

template <int F>
HAL_INLINE void range_of(const Stored<F>* w, int64_t n, float* amin, float* amax) {
  vf low = set1(0), high = set1(0), low2 = low, high2 = high;
  int64_t start = 0;
  for (; start + 32 <= n; start += 32) {  // two chains: a minimum takes four cycles
    ahead(w + start);
    const vf x = load<F>(w + start), y = load<F>(w + start + 16);
    low = min(low, x);
    high = max(high, x);
    low2 = min(low2, y);
    high2 = max(high2, y);
  }
  w += start;
  each_vector(n - start, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    const vf x = load_n<F>(w + i, left);
    low = min(low, x);
    high = max(high, x);
  });
  *amin = least(min(low, low2));
  *amax = most(max(high, high2));
}

// Error of 16 weights of F. Where quotients need no correction, either level of two that are equally far
// will do, and scale (11 bits) times level (8) is exact. Inside: no level is to be clipped.
template <int F, bool Inside, class W>
HAL_INLINE vf error_of(vf x, const Grid& g, W way) {
#if HAL_FMA
  if constexpr (short_way<F, W>) {
    const vf raw = fma(x, g.inverse, set1(MAGIC));
    return fnma(g.scale, sub(Inside ? raw : clipped(raw, g), set1(MAGIC)), x);
  }
#endif
  return sub(mul(g.scale, sub(clipped(raw_level<F>(x, g, way), g), set1(MAGIC))), x);
}

// The ranges of up to 16 groups, one a lane.
struct Ranges {
  vf amin, amax;
};

template <int F>
HAL_INLINE Ranges ranges_of(const HalShape& s, const Stored<F>* w, int64_t first, int64_t count) {
  Lanes low = lanes_of(set1(0)), high = low;
  each_of(s, first, count, [&](int64_t j, int64_t at, int64_t n) __attribute__((always_inline)) {
    float amin, amax;
    range_of<F>(w + at, n, &amin, &amax);
    set_lane(low, j, amin);
    set_lane(high, j, amax);
  });
  return {vector_of(low), vector_of(high)};
}

// Squared errors of one group of n weights in C grids: lane j of `errors`.
template <int F, int C, bool Inside>
HAL_INLINE void errors_of(const Stored<F>* w, const float* importance, int64_t n,
                          const Grid (&grid)[C], int64_t j, Lanes (&errors)[C]) {
  divided(grid[0], [&](auto way) __attribute__((always_inline)) {
    vf sum[C], all = set1(0);
    for (int c = 0; c < C; c++) sum[c] = set1(0);
    each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const vf x = load_n<F>(w + i, left);
      const vf weight = importance ? load_n<HAL_F32>(importance + i, left) : set1(1);
      for (int c = 0; c < C; c++) {
        const vf e = error_of<F, Inside>(x, grid[c], way), square = mul(e, e);
        sum[c] = add(sum[c], importance ? mul(square, weight) : square);
      }
    });
    for (int c = 0; c < C; c++) all = add(all, sum[c]);
    set_folds(errors, j, sum);
    return all;
  });
}

// Of up to 16 groups, one a lane: the factor of the range with the least error so far.
struct Best {
  vf factor, error;
};

// Whether the ends of every range, and with them all weights, are levels without being clipped.
template <int C>
HAL_INLINE bool all_inside(const Batch (&b)[C], const Ranges& r) {
#if HAL_FMA
  vf room = set1(0);
  for (const Batch& grids : b) {
    const vf inverse = vector_of(grids.inverse), magic = set1(MAGIC);
    const vf one = fma(r.amin, inverse, magic), other = fma(r.amax, inverse, magic);
    room = min(room, sub(min(one, other), vector_of(grids.low)));
    room = min(room, sub(vector_of(grids.high), max(one, other)));
  }
  return least(room) >= 0;
#else
  (void)b;
  (void)r;
  return false;
#endif
}

// Tries C factors more; the first of equals stays.
template <int F, int C>
HAL_INLINE void try_factors(const HalSearch& a, int64_t first, int64_t count, const Ranges& r,
                            const float* factors, Best* best) {
  Batch b[C];
  Lanes errors[C];
  bool usual = true;
  for (int c = 0; c < C; c++) {
    const vf f = set1(factors[c]);
    b[c] = batch_of(a.s, groups_of(a.s, mul(r.amin, f), mul(r.amax, f), set1(1), set1(1)));
    errors[c] = lanes_of(set1(0));
    usual = usual && b[c].usual;
  }
  const bool inside = has_short_way<F> && all_inside(b, r);
  each_of(a.s, first, count, [&](int64_t j, int64_t at, int64_t n) __attribute__((always_inline)) {
    const float* importance = a.importance ? a.importance + at % a.s.k : nullptr;
    const Stored<F>* w = (const Stored<F>*)a.w + at;
    Grid grid[C];
    for (int c = 0; c < C; c++) grid[c] = grid_of(b[c], j);
    grid[0].usual = usual;
    if constexpr (has_short_way<F>) {
      if (inside) return errors_of<F, C, true>(w, importance, n, grid, j, errors);
    }
    errors_of<F, C, false>(w, importance, n, grid, j, errors);
  });
  for (int c = 0; c < C; c++) {
    const vf error = vector_of(errors[c]);
    const vm better = lt(error, best->error);
    best->factor = select(better, set1(factors[c]), best->factor);
    best->error = select(better, error, best->error);
  }
}

HAL_VERB void search_groups(const HalSearch* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      const Ranges r = ranges_of<F>(a->s, (const Stored<F>*)a->w, first, count);
      Best best = {set1(1), set1(__builtin_inff())};
      int64_t c = 0;
      for (; c + ABREAST <= a->n_factors; c += ABREAST) {
        try_factors<F, ABREAST>(*a, first, count, r, a->factors + c, &best);
      }
      for (; c < a->n_factors; c++) try_factors<F, 1>(*a, first, count, r, a->factors + c, &best);
      store_n<HAL_F32>(a->amin + first, mul(r.amin, best.factor), count);
      store_n<HAL_F32>(a->amax + first, mul(r.amax, best.factor), count);
    });
  });
}

// Calls body(i, level, n) with MAGIC + q - zero of every 16 weights of a group.
template <int F, class Body>
HAL_INLINE void each_level(const Stored<F>* w, const float* v, int64_t n, const Grid& grid,
                           Body body) {
  if (v) {
    each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      ahead(w + i);
      ahead(v + i);
      body(i, levels_of(load_n<F>(w + i, left), load_n<HAL_F32>(v + i, left), grid).level, left);
    });
    return;
  }
  divided(grid, [&](auto way) __attribute__((always_inline)) {
    vf all = set1(0);
    each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      ahead(w + i);
      const vf raw = raw_level<F>(load_n<F>(w + i, left), grid, way);
      all = add(all, raw);
      body(i, clipped(raw, grid), left);
    });
    return all;
  });
}

HAL_VERB void qdq_groups(const HalQdq* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    const Stored<F>* w = (const Stored<F>*)a->w;
    Stored<F>* out = (Stored<F>*)a->out;
    each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      const Batch b = batch_of(a->s, groups_at(a->s, a->p, first, count));
      each_of(a->s, first, count, [&](int64_t j, int64_t at, int64_t n)
                                      __attribute__((always_inline)) {
        const Grid grid = grid_of(b, j);
        const float* v = a->p.v ? a->p.v + at : nullptr;
        each_level<F>(w + at, v, n, grid, [&](int64_t i, vf level, int64_t left)
                                                 __attribute__((always_inline)) {
          store_normal_n<F>(out + at + i, mul(grid.scale, sub(level, set1(MAGIC))), left);
        });
      });
    });
  });
}

// What the range of a group needs: d loss / d scale, and the gradient that clipping sends to the
// zero point.
struct Sums {
  float by_q, clipped;
};

// Moves v on the way.
template <int F, int H>
HAL_INLINE Sums step_sums(const HalStep& a, const Grid& grid, int64_t at, int64_t n) {
  const Stored<F>* w = (const Stored<F>*)a.w + at;
  const Stored<H>* grad = (const Stored<H>*)a.grad + at;
  float* v = a.p.v ? a.p.v + at : nullptr;
  const vf none = set1(0), move = mul(sign(grid.scale), set1(a.lr_v));
  vf sum_q = none, sum_clipped = none;
  each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    ahead(w + i);
    ahead(grad + i);
    ahead(v + i);
    const vf g = load_n<H>(grad + i, left);
    const vf old = v ? load_n<HAL_F32>(v + i, left) : none;
    const Levels l = levels_of(load_n<F>(w + i, left), old, grid);
    const vf by_scale = minus_if(l.inside, sub(l.level, set1(MAGIC)), l.ratio);
    sum_q = add(sum_q, mul(g, by_scale));
    sum_clipped = add(sum_clipped, select(l.inside, none, g));
    if (v) {
      const vf down = minus_if(lt_if(l.inside, none, g), old, move);
      store_n<HAL_F32>(v + i, plus_if(lt_if(l.inside, g, none), down, move), left);
    }
  });
  return {fold(sum_q), fold(sum_clipped)};
}

// codec.qdq_step_ after the sums: signs of d loss / d lo and d loss / d hi, then the step.
HAL_INLINE void move_ranges(const HalStep& a, const Groups& g, int64_t i, int64_t n, vf by_scale,
                            vf clipped) {
  const vf amin = load_n<HAL_F32>(a.p.amin + i, n), amax = load_n<HAL_F32>(a.p.amax + i, n);
  const vf none = set1(0), top = set1((float)((1 << a.s.bits) - 1));
  vf d_lo, d_hi;
  if (a.s.symmetric) {
    by_scale = select(g.floored, none, by_scale);
    const vf less = negative(by_scale);
    const vm below = lt(g.high, g.low);
    const vf of_low = select(below, by_scale, select(eq(g.high, g.low), less, none));
    d_lo = mul(of_low, negative(amin));
    d_hi = mul(select(below, none, less), amax);
  } else {
    const vf by_zero = negative(mul(g.scale, clipped));
    const vf through_zero = mul(by_zero, div(g.low, mul(g.scale, g.scale)));
    by_scale = select(g.floored, none, sub(by_scale, through_zero));
    d_lo = sub(div(mul(negative(amin), by_scale), top), div(mul(by_zero, amin), g.scale));
    d_hi = div(mul(amax, by_scale), top);
  }
  const vf lr = set1(a.lr_range), one = set1(1);
  const vf lo = sub(load_n<HAL_F32>(a.p.lo + i, n), mul(sign(d_lo), lr));
  const vf hi = sub(load_n<HAL_F32>(a.p.hi + i, n), mul(sign(d_hi), lr));
  store_n<HAL_F32>(a.p.lo + i, clamped(lo, none, one), n);
  store_n<HAL_F32>(a.p.hi + i, clamped(hi, none, one), n);
}

HAL_VERB void step_groups(const HalStep* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    by_dtype(a->grad_dtype, [&](auto grad) __attribute__((always_inline)) {
      each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        const Groups groups = groups_at(a->s, a->p, first, count);
        const Batch b = batch_of(a->s, groups);
        Lanes by_q = lanes_of(set1(0)), clipped = by_q;
        each_of(a->s, first, count, [&](int64_t j, int64_t at, int64_t n)
                                        __attribute__((always_inline)) {
          const Sums sums =
              step_sums<decltype(dtype)::value, decltype(grad)::value>(*a, grid_of(b, j), at, n);
          set_lane(by_q, j, sums.by_q);
          set_lane(clipped, j, sums.clipped);
        });
        move_ranges(*a, groups, first, count, vector_of(by_q), vector_of(clipped));
      });
    });
  });
}

HAL_VERB void quantize_groups(const HalPlain* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    const Stored<F>* w = (const Stored<F>*)a->w;
    each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      const Batch b = batch_of(a->s, groups_at(a->s, a->p, first, count));
      each_of(a->s, first, count, [&](int64_t j, int64_t at, int64_t n)
                                      __attribute__((always_inline)) {
        const Grid grid = grid_of(b, j);
        const float* v = a->p.v ? a->p.v + at : nullptr;
        each_level<F>(w + at, v, n, grid, [&](int64_t i, vf level, int64_t left)
                                                 __attribute__((always_inline)) {
          store_low_bytes_n(a->codes + at + i, add(level, grid.zero), left);
        });
        store_float(a->scale, first + j, lane(b.scale, j), a->s.scale_dtype);
        if (a->zero) a->zero[first + j] = (uint8_t)lane(b.zero, j);
      });
    });
  });
}

// Scales this small come from files only: ours have a floor.
HAL_INLINE bool any_subnormal(vf scale) {
  const vf size = max(scale, negative(scale));
  return least(select(lt(set1(0), size), size, set1(1))) < 0x1p-126f;
}

HAL_VERB void dequantize_groups(const HalPlain* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    Stored<F>* out = (Stored<F>*)a->out;
    each_batch(from, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      const vf some = load_any(a->scale, first, count, a->s.scale_dtype);
      const Lanes scales = lanes_of(some);
      const bool normal = !any_subnormal(some);
      each_of(a->s, first, count, [&](int64_t j, int64_t at, int64_t n)
                                      __attribute__((always_inline)) {
        const vf scale = set1(lane(scales, j));
        const vf zero = set1(a->zero ? (float)a->zero[first + j] : (float)(1 << (a->s.bits - 1)));
        each_vector(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
          ahead(a->codes + at + i);
          const vf x = mul(scale, sub(load_codes_n(a->codes + at + i, left), zero));
          if (normal) store_normal_n<F>(out + at + i, x, left);
          else store_n<F>(out + at + i, x, left);
        });
      });
    });
  });
}

// codec.quantize_act of one group: n activations to codes by `scale`.
template <int F>
HAL_INLINE void act_codes(const Stored<F>* x, int64_t n, float scale, int8_t* codes) {
  uint8_t* out = (uint8_t*)codes;
  const bool usual = scale > 0x1p-100f && scale < 0x1p100f;
  const Grid grid = {set1(scale),       set1(1 / scale),    set1(0), set1(MAGIC - 127),
                     set1(MAGIC + 127), usual,              true};
  each_level<F>(x, nullptr, n, grid, [&](int64_t i, vf level, int64_t left)
                                            __attribute__((always_inline)) {
    store_low_bytes_n(out + i, level, left);
  });
}

template <int F>
HAL_INLINE float act_scale(const Stored<F>* x, int64_t n) {
  float low, high;
  range_of<F>(x, n, &low, &high);
  const float most = high > -low ? high : -low, scale = most / 127;
  return scale == 0 ? 1 : scale;
}

HAL_VERB void quantize_act_groups(const HalAct* a, int64_t from, int64_t end) {
  by_dtype(a->s.dtype, [&](auto dtype) __attribute__((always_inline)) {
    constexpr int F = decltype(dtype)::value;
    each_of(a->s, from, end - from, [&](int64_t j, int64_t at, int64_t n)
                                          __attribute__((always_inline)) {
      const Stored<F>* x = (const Stored<F>*)a->x + at;
      const float scale = a->given ? a->scale[from + j] : act_scale<F>(x, n);
      if (!a->given) a->scale[from + j] = scale;
      act_codes<F>(x, n, scale, a->codes + at);
    });
  });
}

}  // namespace
