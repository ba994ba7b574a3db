# SPDX-License-Identifier: Apache-2.0
"""Search, fake quantization, the signed step, codes and back: one program, a few groups.

Sums over a group go by chunks of 16 columns, a lane each (`codec.fold`), so that their order is the
reference's. ``w``, ``grad``, ``out``: ``[n, k]`` f32, bf16 or f16; parameters ``[n, groups]`` f32.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.codec import (
    EXACT,
    FLOATS,
    Encoding,
    fold,
    levels,
    places,
    rne,
    scale_zero,
    sign,
    stored,
    wide,
)

LANES = 16
TILE = 2048  # numbers in the registers of a program


def _grid(e: Encoding, rows: int) -> tuple[int]:
    return (triton.cdiv(e.n * e.groups, rows),)


def _tile(e: Encoding) -> dict[str, int]:
    """Tiles of kernels that take no sums."""
    columns = min(max(LANES, triton.next_power_of_2(e.width)), 128)
    return {"ROWS": TILE // columns, "COLUMNS": columns}


@triton.jit
def _parameters(group, exists, lo, hi, amin, amax, least, MAX: tl.constexpr, HALF: tl.constexpr,
                SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    low = -(tl.load(amin + group, exists, 0.0) * tl.load(lo + group, exists, 0.0))
    high = tl.load(amax + group, exists, 0.0) * tl.load(hi + group, exists, 0.0)
    scale, zero, floored = scale_zero(low, high, least, MAX, HALF, SYMMETRIC, SCALE)
    return low, high, scale, zero, floored


@triton.jit
def _encode(w, v, lo, hi, amin, amax, out, codes, scales, zeros, k, groups, count, least,
            WIDTH: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr,
            SCALE: tl.constexpr, OFFSET: tl.constexpr, STORE: tl.constexpr, FLOAT: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Levels of the weight: stored with scales and zeros (STORE), or decoded into ``out``."""
    group, exists, at, mask = places(k, groups, count, 0, WIDTH, ROWS, COLUMNS)
    low, high, scale, zero, floored = _parameters(
        group, exists, lo, hi, amin, amax, least, MAX, HALF, SYMMETRIC, SCALE
    )
    for column in range(0, WIDTH, COLUMNS):
        group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, COLUMNS)
        ratio = tl.div_rn(wide(tl.load(w + at, mask, 0.0)), scale[:, None])
        offset = tl.load(v + at, mask, 0.0) if OFFSET else 0.0
        q, inside = levels(ratio, offset, zero[:, None], MAX)
        if STORE:
            tl.store(codes + at, q.to(tl.uint8), mask)
        else:
            tl.store(out + at, stored(scale[:, None] * (q - zero[:, None]), FLOAT), mask)
    if STORE:
        tl.store(scales + group, scale, exists)
        if not SYMMETRIC:
            tl.store(zeros + group, zero.to(tl.uint8), exists)


def qdq(w: Tensor, p: Any, e: Encoding, out: Tensor) -> None:
    """`hal.qdq`; ``p`` is a `hal.Params`."""
    _launch_encode(w, p, e, out, None, None, None)


def quantize(
    w: Tensor, p: Any, e: Encoding, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> None:
    """`hal.quantize` into ``codes`` u8 ``[n, k]``, ``scale``, ``zero`` u8 ``[n, groups]``."""
    _launch_encode(w, p, e, None, codes, scale, zero)


def _launch_encode(
    w: Tensor,
    p: Any,
    e: Encoding,
    out: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
) -> None:
    tile = _tile(e)
    _encode[_grid(e, tile["ROWS"])](
        w, p.v, p.lo, p.hi, p.amin, p.amax, out, codes, scale, zero,
        e.k, e.groups, e.n * e.groups, e.least, **e.constants, OFFSET=p.v is not None,
        STORE=codes is not None, FLOAT=FLOATS[w.dtype], num_warps=8, **tile, **EXACT,
    )  # fmt: skip


@triton.jit
def _decode(codes, scales, zeros, out, k, groups, count, WIDTH: tl.constexpr, MAX: tl.constexpr,
            HALF: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr, FLOAT: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    group, exists, at, mask = places(k, groups, count, 0, WIDTH, ROWS, COLUMNS)
    scale = wide(tl.load(scales + group, exists, 0.0))
    if SYMMETRIC:
        zero = tl.full([ROWS], HALF, tl.float32)
    else:
        zero = tl.load(zeros + group, exists, 0).to(tl.float32)
    for column in range(0, WIDTH, COLUMNS):
        group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, COLUMNS)
        q = tl.load(codes + at, mask, 0).to(tl.float32)
        tl.store(out + at, stored(scale[:, None] * (q - zero[:, None]), FLOAT), mask)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, e: Encoding, out: Tensor) -> None:
    """`hal.dequantize` of plain parts into ``out`` ``[n, k]``."""
    tile = _tile(e)
    _decode[_grid(e, tile["ROWS"])](
        codes, scale, zero, out, e.k, e.groups, e.n * e.groups, **e.constants,
        FLOAT=FLOATS[out.dtype], **tile, **EXACT,
    )  # fmt: skip


@triton.jit
def _step(w, grad, v, lo, hi, amin, amax, k, groups, count, least, lr_v, lr_range,
          WIDTH: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr,
          SCALE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    group, exists, at, mask = places(k, groups, count, 0, WIDTH, ROWS, 16)
    low, high, scale, zero, floored = _parameters(
        group, exists, lo, hi, amin, amax, least, MAX, HALF, SYMMETRIC, SCALE
    )
    by_scale, clipped = tl.zeros([ROWS, 16], tl.float32), tl.zeros([ROWS, 16], tl.float32)
    for column in range(0, WIDTH, 16):
        group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, 16)
        ratio = tl.div_rn(wide(tl.load(w + at, mask, 0.0)), scale[:, None])
        g = wide(tl.load(grad + at, mask, 0.0))
        offset = tl.load(v + at, mask, 0.0) if OFFSET else tl.zeros([ROWS, 16], tl.float32)
        q, inside = levels(ratio, offset, zero[:, None], MAX)
        by_scale += g * ((q - zero[:, None]) - tl.where(inside, ratio, 0.0))
        if not SYMMETRIC:
            clipped += tl.where(inside, 0.0, g)
        if OFFSET:
            move = tl.where(inside, sign(g), 0.0) * sign(scale)[:, None]
            tl.store(v + at, offset - move * lr_v, mask)
    bottom, top = tl.load(amin + group, exists, 0.0), tl.load(amax + group, exists, 0.0)
    d_scale = fold(by_scale, ROWS)
    if SYMMETRIC:
        d_scale = tl.where(floored, 0.0, d_scale)
        d_lo = tl.where(high < low, d_scale, tl.where(high == low, -d_scale, 0.0)) * -bottom
        d_hi = tl.where(high < low, 0.0, -d_scale) * top
    else:
        steps = tl.full([ROWS], MAX, tl.float32)
        d_zero = -(scale * fold(clipped, ROWS))
        d_scale = d_scale - d_zero * tl.div_rn(low, scale * scale)
        d_scale = tl.where(floored, 0.0, d_scale)
        d_lo = tl.div_rn(-bottom * d_scale, steps) - tl.div_rn(d_zero * bottom, scale)
        d_hi = tl.div_rn(top * d_scale, steps)
    new_lo = tl.load(lo + group, exists, 0.0) - sign(d_lo) * lr_range
    new_hi = tl.load(hi + group, exists, 0.0) - sign(d_hi) * lr_range
    tl.store(lo + group, tl.clamp(new_lo, 0.0, 1.0), exists)
    tl.store(hi + group, tl.clamp(new_hi, 0.0, 1.0), exists)


def qdq_step_(p: Any, w: Tensor, grad: Tensor, e: Encoding, lr_v: float, lr_range: float) -> None:
    """`hal.qdq_step_`: reads w, v, grad and writes v once each."""
    rows = TILE // LANES // 2
    _step[_grid(e, rows)](
        w, grad, p.v, p.lo, p.hi, p.amin, p.amax, e.k, e.groups, e.n * e.groups, e.least,
        lr_v, lr_range, **e.constants, OFFSET=p.v is not None, ROWS=rows, **EXACT,
    )  # fmt: skip


@triton.jit
def _search(w, importance, factors, tried, amin, amax, k, groups, count, least,
            WIDTH: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr,
            SCALE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    group, exists, at, mask = places(k, groups, count, 0, WIDTH, ROWS, 16)
    bottom, top = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for column in range(0, WIDTH, 16):
        group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, 16)
        x = wide(tl.load(w + at, mask, 0.0))
        bottom = tl.minimum(bottom, tl.min(x, axis=1))
        top = tl.maximum(top, tl.max(x, axis=1))
    least_error, best = tl.full([ROWS], float("inf"), tl.float32), tl.full([ROWS], 1.0, tl.float32)
    for i in range(tried):
        factor = tl.load(factors + i)
        scale, zero, floored = scale_zero(
            -(bottom * factor), top * factor, least, MAX, HALF, SYMMETRIC, SCALE
        )
        lanes = tl.zeros([ROWS, 16], tl.float32)
        for column in range(0, WIDTH, 16):
            group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, 16)
            x = wide(tl.load(w + at, mask, 0.0))
            q, inside = levels(tl.div_rn(x, scale[:, None]), 0.0, zero[:, None], MAX)
            error = scale[:, None] * (q - zero[:, None]) - x
            error = error * error
            if WEIGHTED:
                error = error * tl.load(importance + at % k, mask, 0.0)
            lanes += tl.where(mask, error, 0.0)
        error = fold(lanes, ROWS)
        best = tl.where(error < least_error, factor, best)
        least_error = tl.minimum(error, least_error)
    tl.store(amin + group, bottom * best, exists)
    tl.store(amax + group, top * best, exists)


@cache
def _on(device: torch.device, factors: tuple[float, ...]) -> Tensor:
    """Copied once: a graph that is being captured takes no copies from the host."""
    return torch.tensor(factors, dtype=torch.float32, device=device)


def search(
    w: Tensor, importance: Tensor | None, factors: list[float], e: Encoding,
    amin: Tensor, amax: Tensor,
) -> None:  # fmt: skip
    """`hal.search`: the best of ``factors`` (none = min-max) of every group's range."""
    rows = TILE // LANES // 2
    given = _on(w.device, tuple(factors))
    _search[_grid(e, rows)](
        w, importance, given, len(factors), amin, amax, e.k, e.groups, e.n * e.groups, e.least,
        **e.constants, WEIGHTED=importance is not None, ROWS=rows, **EXACT,
    )  # fmt: skip


@triton.jit
def _quantize_act(x, codes, scales, k, groups, count, WIDTH: tl.constexpr, GIVEN: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    group, exists, at, mask = places(k, groups, count, 0, WIDTH, ROWS, COLUMNS)
    if GIVEN:
        scale = tl.load(scales + group, exists, 1.0)
    else:
        largest = tl.zeros([ROWS], tl.float32)
        for column in range(0, WIDTH, COLUMNS):
            group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, COLUMNS)
            value = tl.abs(wide(tl.load(x + at, mask, 0.0)))
            largest = tl.maximum(largest, tl.max(value, axis=1))
        scale = tl.div_rn(largest, tl.full([ROWS], 127.0, tl.float32))
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + group, scale, exists)
    for column in range(0, WIDTH, COLUMNS):
        group, exists, at, mask = places(k, groups, count, column, WIDTH, ROWS, COLUMNS)
        value = wide(tl.load(x + at, mask, 0.0))
        code = tl.clamp(rne(tl.div_rn(value, scale[:, None])), -127.0, 127.0)
        tl.store(codes + at, code.to(tl.int8), mask)


def quantize_act(x: Tensor, e: Encoding, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`hal.quantize_act`: codes s8 ``[n, k]``, scales f32 ``[n, groups]`` (those given, if any)."""
    codes, given = torch.empty_like(x, dtype=torch.int8), scale is not None
    if scale is None:
        scale = torch.empty(e.n, e.groups, dtype=torch.float32, device=x.device)
    scale = scale.float().contiguous()
    tile = _tile(e)
    _quantize_act[_grid(e, tile["ROWS"])](
        x, codes, scale, e.k, e.groups, e.n * e.groups, WIDTH=e.width, GIVEN=given, **tile, **EXACT
    )
    return codes, scale
