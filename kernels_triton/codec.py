# SPDX-License-Identifier: Apache-2.0
"""The numeric truth (`hal.codec`) as device functions: scale, levels, rounding, bit for bit."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

#: Triton runs on CPU tensors, slowly, for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: Launch options of everything that must equal the reference bit for bit.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
#: And of the rest: said, because Triton's default changes with its version.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Encoding(NamedTuple):
    """`hal.Spec` of an ``[n, k]`` matrix in numbers. ``least``: the smallest |scale| as stored."""

    n: int
    k: int
    width: int
    groups: int
    bits: int
    symmetric: bool
    scale_dtype: torch.dtype
    least: float

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "WIDTH": self.width,
            "MAX": (1 << self.bits) - 1,
            "HALF": 1 << (self.bits - 1),
            "SYMMETRIC": self.symmetric,
            "SCALE": FLOATS[self.scale_dtype],
        }


@triton.jit
def wide(x):
    """Any float as f32; bf16 by its bits, whose subnormals the interpreter gets wrong."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rne(x):
    """Round half to even; beyond 2^21, where every caller clips anyway, to 2^21."""
    return (tl.clamp(x, -2097152.0, 2097152.0) + 12582912.0) - 12582912.0


@triton.jit
def stored(x, FLOAT: tl.constexpr):
    """f32 rounded to a storage dtype (`FLOATS`), as f32."""
    if FLOAT == 1:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    elif FLOAT == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def scale_zero(low, high, least, MAX: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr,
               SCALE: tl.constexpr):  # fmt: skip
    """Scale, zero level and whether the scale's floor is active, of ranges ``-low .. high``."""
    if SYMMETRIC:
        most = tl.maximum(low, high)
        exact = tl.where(high < low, most, -most) * (1.0 / HALF)
    else:
        exact = tl.div_rn(high + low, tl.full(low.shape, MAX, tl.float32))
    scale = stored(exact, SCALE)
    floored = tl.abs(scale) < least
    scale = tl.where(scale < 0, tl.minimum(scale, -least), tl.maximum(scale, least))
    if SYMMETRIC:
        zero = tl.full(low.shape, HALF, tl.float32)
    else:
        zero = tl.clamp(rne(tl.div_rn(low, scale)), 0.0, MAX)
    return scale, zero, floored


@triton.jit
def levels(ratio, offset, zero, MAX: tl.constexpr):
    """Unsigned levels of ``w / scale`` plus offset, and where nothing was clipped."""
    raw = rne(ratio + offset) + zero
    q = tl.clamp(raw, 0.0, MAX)
    return q, raw == q


@triton.jit
def fold(lanes, ROWS: tl.constexpr):
    """``[ROWS, 16] -> [ROWS]``: lanes fold 8, 4, 2, 1, as everywhere in the HAL."""
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 8]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 2]), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit
def places(k, groups, count, at, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of ``ROWS`` groups of this program, columns ``at ..``: group, its mask; address, its mask."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at + tl.arange(0, COLUMNS)
    column = (group % groups)[:, None] * WIDTH + inside[None, :]
    exists = group < count
    mask = exists[:, None] & (inside < WIDTH)[None, :] & (column < k)
    return group, exists, (group // groups)[:, None] * k + column, mask
