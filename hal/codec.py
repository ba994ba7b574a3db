# SPDX-License-Identifier: Apache-2.0
"""The numeric truth, in torch: every other implementation equals these functions bit for bit.

Contract: scale arithmetic in f32, true division, round half to even, the scale is rounded to its
storage dtype before codes are computed, no fused multiply-add, and sums over a group are taken in
16 lanes (`lane_sum`), so that SIMD code of any width can reproduce them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hal.qtensor import Params
from hal.spec import Spec

LANES = 16


def grouped(x: Tensor, spec: Spec) -> Tensor:
    """``[N, K] -> [N, G, W]`` f32, the last group padded with zeros."""
    n, k = x.shape
    width, groups = spec.width(k), spec.groups(k)
    return F.pad(x.float(), (0, groups * width - k)).view(n, groups, width)


def ungrouped(x: Tensor, k: int) -> Tensor:
    """``[N, G, W] -> [N, K]``, padding cut off."""
    return x.flatten(1)[:, :k]


def lane_sum(x: Tensor) -> Tensor:
    """``[..., W] -> [...]``: lane j adds elements j, j+16, ... in order; lanes fold 8, 4, 2, 1."""
    x = F.pad(x, (0, -x.shape[-1] % LANES))
    x = x.view(*x.shape[:-1], -1, LANES)
    acc = torch.zeros_like(x[..., 0, :])
    for i in range(x.shape[-2]):
        acc = acc + x[..., i, :]
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half : 2 * half]
    return acc[..., 0]


def value_range(w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """``w [N, K] -> amin, amax [N, G]`` f32, clamped through zero."""
    g = grouped(w, spec)
    return g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)


def _store(scale: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Round to the storage dtype and floor the magnitude; returns (scale f32, floor was active)."""
    stored = scale.to(spec.scale_dtype).float()
    least = float(torch.tensor(spec.min_scale, dtype=spec.scale_dtype))
    floored = stored.abs() < least
    return torch.where(stored < 0, stored.clamp(max=-least), stored.clamp(min=least)), floored


def scale_zero(p: Params, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """``(scale f32, zero level f32, floored bool)`` of every group, each ``[N, G]``.

    Symmetric: the larger side of the range maps to the lowest level, hence the signed scale
    (algorithms.md 1.2). Asymmetric: ``scale = range / max_level``, ``zero = rne(-amin / scale)``.
    """
    low, high = -(p.amin * p.lo), p.amax * p.hi
    if spec.symmetric:
        sign = torch.where(high < low, 1.0, -1.0)
        scale, floored = _store(sign * torch.maximum(low, high) / spec.half, spec)
        return scale, torch.full_like(scale, spec.half), floored
    scale, floored = _store((high + low) / spec.max_level, spec)
    return scale, (low / scale).round().clamp(0, spec.max_level), floored


def levels(w: Tensor, p: Params, spec: Spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``w [N, K]`` to ``(unsigned levels, inside [N, G, W], scale, zero [N, G])``.

    ``inside`` marks elements whose rounded level needed no clipping.
    """
    scale, zero, _ = scale_zero(p, spec)
    t = grouped(w, spec) / scale[..., None]
    if p.v is not None:
        t = t + grouped(p.v, spec)
    raw = t.round() + zero[..., None]
    q = raw.clamp(0, spec.max_level)
    return q, raw == q, scale, zero


def qdq(w: Tensor, p: Params, spec: Spec) -> Tensor:
    """Fake-quantized weight ``[N, K]`` in the dtype of ``w``."""
    q, _, scale, zero = levels(w, p, spec)
    return ungrouped(scale[..., None] * (q - zero[..., None]), w.shape[1]).to(w.dtype)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """Plain parts to the dequantized ``[N, K]`` f32 weight."""
    z = spec.half if zero is None else zero.float()[..., None]
    return ungrouped(scale.float()[..., None] * (grouped(codes, spec) - z), codes.shape[1])


def _sign(x: Tensor) -> Tensor:
    return (x > 0).float() - (x < 0).float()


def qdq_step_(p: Params, w: Tensor, grad: Tensor, spec: Spec, lr_v: float, lr_range: float) -> None:
    """One signed gradient step on ``p`` in place: the closed form of the STE gradient (1.3).

    ``grad`` = dL/d qdq(w), ``[N, K]``. Equal to autograd in every sign, except where a group's sum
    cancels to rounding error.
    """
    q, inside, scale, zero = levels(w, p, spec)
    _, _, floored = scale_zero(p, spec)
    g, ratio = grouped(grad, spec), grouped(w, spec) / scale[..., None]
    by_scale = lane_sum(g * ((q - zero[..., None]) - torch.where(inside, ratio, 0.0)))
    low, high = -(p.amin * p.lo), p.amax * p.hi
    if spec.symmetric:
        by_scale = torch.where(floored, 0.0, by_scale)
        d_lo = torch.where(high < low, by_scale, torch.where(high == low, -by_scale, 0.0)) * -p.amin
        d_hi = torch.where(high < low, 0.0, -by_scale) * p.amax
    else:
        by_zero = -(scale * lane_sum(torch.where(inside, 0.0, g)))
        by_scale = torch.where(floored, 0.0, by_scale - by_zero * (low / (scale * scale)))
        d_lo = -p.amin * by_scale / spec.max_level - by_zero * p.amin / scale
        d_hi = p.amax * by_scale / spec.max_level
    if p.v is not None:
        step = torch.where(inside, _sign(g), 0.0) * _sign(scale)[..., None]
        p.v.sub_(ungrouped(step, w.shape[1]) * lr_v)
    p.lo.sub_(_sign(d_lo) * lr_range).clamp_(0, 1)
    p.hi.sub_(_sign(d_hi) * lr_range).clamp_(0, 1)


def search_factors(grid: int) -> list[float]:
    """Range multipliers tried by `search`: 1 first, then 1 / (1 - 0.75 k / h), k = -h .. h."""
    half = grid // 2
    return [1.0] + [1 / (1 - 0.75 * k / half) for k in range(-half, half + 1) if k and half]


def search(w: Tensor, spec: Spec, importance: Tensor | None, grid: int) -> tuple[Tensor, Tensor]:
    """Initial range ``(amin, amax) [N, G]``: min-max, or the multiple of it with the least error.

    Error of a group: sum of importance * (qdq(w) - w)^2 with ``importance [K]`` f32 (None = 1).
    A later candidate wins only if strictly better.
    """
    amin, amax = value_range(w, spec)
    if grid < 2:
        return amin, amax
    x, ones = grouped(w, spec), torch.ones_like(amin)
    weight = None if importance is None else grouped(importance[None], spec)
    least, best = torch.full_like(amin, torch.inf), ones
    for factor in search_factors(grid):
        p = Params(None, ones, ones, amin * factor, amax * factor)
        q, _, scale, zero = levels(w, p, spec)
        e = scale[..., None] * (q - zero[..., None]) - x
        err = lane_sum(e * e if weight is None else e * e * weight)
        better = err < least
        least, best = torch.where(better, err, least), torch.where(better, factor, best)
    return amin * best, amax * best


def quantize_act(x: Tensor, group: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x [M, K] -> codes s8 [M, K], scale f32 [M, G]``: symmetric, scale = amax / 127."""
    rows = Spec("s8", group, "f32")
    g = grouped(x, rows)
    if scale is None:
        scale = g.abs().amax(-1) / 127
        scale = torch.where(scale == 0, 1.0, scale)
    codes = (g / scale[..., None]).round().clamp(-127, 127)
    return ungrouped(codes, x.shape[1]).to(torch.int8), scale


def hadamard(x: Tensor, block: int) -> Tensor:
    """Blocks of columns of ``x [..., K]`` times Sylvester's matrix over sqrt(block).

    Butterflies of neighbours first, then of pairs, fours, ... in f32; one product with the factor,
    one rounding to the dtype of ``x``.
    """
    h, step = x.float().contiguous(), 1
    while step < block:
        a, b = h.view(-1, 2, step).unbind(1)
        h, step = torch.stack([a + b, a - b], 1), step * 2
    return (h * torch.tensor(block**-0.5, device=x.device)).view(x.shape).to(x.dtype)
