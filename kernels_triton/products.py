# SPDX-License-Identifier: Apache-2.0
"""Products with a weight in bit planes: one row, few rows with split K, tiles, experts, dense.

**Planes.** A row of codes, padded to ``PAD`` columns, is cut into the binary digits of its width:
6 bits are a plane of nibbles and a plane of bit pairs, one after the other; 8 bits are bytes. In a
plane neighbours share a byte, lowest first, so a tile is a few coalesced loads, shifts and
interleavings. Rows are independent: weights may be joined.

Codes minus the zero level are integers below 256 and exact in bf16 and f16; the dot product of a
group is taken on them and scaled in f32 afterwards, so nothing is rounded but the output.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.codec import FLOATS, FUSED, INTERPRETED, stored, wide

PAD = 128
PLANES = (4, 2, 1)


class Planes(NamedTuple):
    """A weight ``[experts * n, k]``: codes u8 ``[., padded * bits / 8]``, scale and zero level u8
    ``[., groups]`` (None = symmetric)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    n: int
    k: int
    width: int
    bits: int

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "K": self.k,
            "PADDED": padded(self.k),
            "WIDTH": self.width,
            "GROUPS": self.scale.shape[1],
            "BITS": self.bits,
            "SYMMETRIC": self.zero is None,
        }


def padded(k: int) -> int:
    """Columns of a row in planes."""
    return -(-k // PAD) * PAD


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """``codes`` u8 ``[n, k]`` -> u8 ``[n, padded(k) * bits / 8]``."""
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, padded(k) - k))
    if bits == 8:
        return codes
    planes, shift = [], 0
    for width in _planes(bits):
        field = (codes >> shift & (1 << width) - 1).view(n, -1, 8 // width)
        byte = torch.zeros_like(field[..., 0])
        for i in range(8 // width):
            byte |= field[..., i] << width * i
        planes.append(byte)
        shift += width
    return torch.cat(planes, 1)


def from_planes(planes: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `to_planes`: codes u8 ``[n, k]``."""
    if bits == 8:
        return planes[:, :k].contiguous()
    n, shift, start = planes.shape[0], 0, 0
    codes = torch.zeros(n, padded(k), dtype=torch.uint8, device=planes.device)
    for width in _planes(bits):
        byte = planes[:, start : start + padded(k) * width // 8]
        fields = [byte >> width * i & (1 << width) - 1 for i in range(8 // width)]
        codes |= torch.stack(fields, -1).view(n, -1) << shift
        shift, start = shift + width, start + byte.shape[1]
    return codes[:, :k].contiguous()


def _planes(bits: int) -> list[int]:
    return [width for width in PLANES if bits & width]


@triton.jit
def _codes(codes, row, k, PADDED: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Codes of rows ``[R]`` at columns ``k .. k + TILE``: i32 ``[R, TILE]``."""
    base = codes + row.to(tl.int64)[:, None] * (PADDED * BITS // 8)
    if BITS == 8:
        q = tl.load(base + k + tl.arange(0, TILE)[None, :]).to(tl.int32)
    else:
        q = tl.zeros([row.shape[0], TILE], tl.int32)
        if BITS & 4:
            b = tl.load(base + k // 2 + tl.arange(0, TILE // 2)[None, :]).to(tl.int32)
            q = tl.interleave(b & 15, b >> 4)
        if BITS & 2:
            at = base + (BITS & 4) * PADDED // 8 + k // 4
            b = tl.load(at + tl.arange(0, TILE // 4)[None, :]).to(tl.int32)
            even, odd = tl.interleave(b & 3, b >> 4 & 3), tl.interleave(b >> 2 & 3, b >> 6)
            q = q | tl.interleave(even, odd) << (BITS & 4)
        if BITS & 1:
            at = base + (BITS & 6) * PADDED // 8 + k // 8
            b = tl.load(at + tl.arange(0, TILE // 8)[None, :]).to(tl.int32)
            b04, b26 = tl.interleave(b & 1, b >> 4 & 1), tl.interleave(b >> 2 & 1, b >> 6 & 1)
            b15, b37 = tl.interleave(b >> 1 & 1, b >> 5 & 1), tl.interleave(b >> 3 & 1, b >> 7)
            q = q | tl.interleave(tl.interleave(b04, b26), tl.interleave(b15, b37)) << (BITS & 6)
    return q


@triton.jit
def _float(q):
    """Integers 0 .. 255 as f32, by their bits: a conversion would run at a quarter of the rate."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _group(scale, zero, row, group, GROUPS: tl.constexpr, BITS: tl.constexpr,
           SYMMETRIC: tl.constexpr):  # fmt: skip
    """Scale and zero level of one group of rows ``[R]``, f32 ``[R]``."""
    at = row.to(tl.int64) * GROUPS + group
    s = wide(tl.load(scale + at))
    if SYMMETRIC:
        z = tl.full(s.shape, 1 << (BITS - 1), tl.float32)
    else:
        z = tl.load(zero + at).to(tl.float32)
    return s, z


@triton.jit
def _finish(total, bias, out, at, column, mask, FLOAT: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        total += wide(tl.load(bias + column))
    tl.store(out + at, stored(total, FLOAT), mask)


@triton.jit
def _row(x, codes, scale, zero, bias, out, n, K: tl.constexpr, PADDED: tl.constexpr,
         WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
         FLOAT: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
         TILE: tl.constexpr):  # fmt: skip
    """One row of activations: a sum over ``TILE`` columns, in one group or of whole ones."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    exists = column < n
    row = tl.minimum(column, n - 1)
    total = tl.zeros([BN], tl.float32)
    for k in range(0, K, TILE):
        at = k + tl.arange(0, TILE)
        given = wide(tl.load(x + at, at < K, 0.0))
        q = _float(_codes(codes, row, k, PADDED, BITS, TILE))
        if TILE <= WIDTH or GROUPS == 1:
            s, z = _group(scale, zero, row, k // WIDTH, GROUPS, BITS, SYMMETRIC)
            total += s * tl.sum((q - z[:, None]) * given[None, :], axis=1)
        else:
            COUNT: tl.constexpr = TILE // WIDTH
            group = tl.minimum(k // WIDTH + tl.arange(0, COUNT), GROUPS - 1)
            where = row.to(tl.int64)[:, None] * GROUPS + group[None, :]
            s = wide(tl.load(scale + where))
            if SYMMETRIC:
                z = tl.full([BN, COUNT], 1 << (BITS - 1), tl.float32)
            else:
                z = tl.load(zero + where).to(tl.float32)
            parts = tl.reshape(q, [BN, COUNT, WIDTH]) - z[:, :, None]
            parts = parts * tl.reshape(given, [1, COUNT, WIDTH])
            total += tl.sum(s * tl.sum(parts, axis=2), axis=1)
    _finish(total, bias, out, column, column, exists, FLOAT, BIAS)


@triton.jit
def _tile(x, codes, scale, zero, bias, out, parts, tiles, m, n, K: tl.constexpr,
          PADDED: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
          SYMMETRIC: tl.constexpr, FLOAT: tl.constexpr, BIAS: tl.constexpr, EXPERTS: tl.constexpr,
          SPLIT: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """A tile of the output; of a part of the columns of x, into ``parts``, where they are split.

    ``tiles`` i32 [programs, 3] where there are experts: expert, first and past-last row of x.
    """
    expert, first, end = 0, tl.program_id(0) * BM, m
    if EXPERTS:
        entry = tiles + tl.program_id(0) * 3
        expert, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if first < end:
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        row = expert * n + tl.minimum(column, n - 1)
        i = first + tl.arange(0, BM)
        total = tl.zeros([BM, BN], tl.float32)
        span = tl.cdiv(tl.cdiv(K, TILE), SPLIT) * TILE
        start = tl.program_id(2) * span
        for k in range(start, tl.minimum(start + span, K), TILE):
            at = k + tl.arange(0, TILE)
            mask = (i < end)[:, None] & (at < K)[None, :]
            given = tl.load(x + i.to(tl.int64)[:, None] * K + at[None, :], mask, 0.0).to(DOT)
            s, z = _group(scale, zero, row, k // WIDTH, GROUPS, BITS, SYMMETRIC)
            q = _float(_codes(codes, row, k, PADDED, BITS, TILE)) - z[:, None]
            dot = tl.dot(given, tl.trans(q.to(DOT)), input_precision="ieee")
            total += dot * s[None, :]
        mask = (i < end)[:, None] & (column < n)[None, :]
        at = i.to(tl.int64)[:, None] * n + column[None, :]
        if SPLIT > 1:
            tl.store(parts + tl.program_id(2).to(tl.int64) * m * n + at, total, mask)
        else:
            _finish(total, bias, out, at, tl.minimum(column, n - 1)[None, :], mask, FLOAT, BIAS)


@triton.jit
def _sum(parts, bias, out, n, count, FLOAT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
         SIZE: tl.constexpr):  # fmt: skip
    """The parts of a split product, first to last."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < count
    total = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count.to(tl.int64) + at, mask, 0.0)
    _finish(total, bias, out, at, at % n, mask, FLOAT, BIAS)


@triton.jit
def _decode(codes, scale, zero, out, n, K: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
            GROUPS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, FLOAT: tl.constexpr,
            BN: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    column, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * TILE
    row, at = tl.minimum(column, n - 1), k + tl.arange(0, TILE)
    s, z = _group(scale, zero, row, k // WIDTH, GROUPS, BITS, SYMMETRIC)
    w = s[:, None] * (_float(_codes(codes, row, k, PADDED, BITS, TILE)) - z[:, None])
    mask = (column < n)[:, None] & (at < K)[None, :]
    tl.store(out + column.to(tl.int64)[:, None] * K + at[None, :], stored(w, FLOAT), mask)


@dataclass(frozen=True, slots=True)
class Config:
    """How to launch: rows and columns of the output a program, columns of x a step, parts of K."""

    bm: int
    bn: int
    tile: int
    split: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, **FUSED}


def step(width: int, groups: int, most: int) -> int:
    """Columns that a program takes at a time: a power of two that ends where groups do."""
    return most if groups == 1 else min(most, width & -width)


def configure(m: int, n: int, k: int, width: int, groups: int, units: int) -> Config:
    """How to multiply ``m`` rows on a device of ``units`` processors: enough programs for all."""
    if m == 1:
        most = padded(k) & -padded(k)
        whole = groups > 1 and width & (width - 1) == 0
        tile = max(width, min(most, 4 * PAD)) if whole else step(width, groups, PAD)
        return Config(1, 4, min(tile, most), 1, 4, 3)
    bm, bn = min(128, max(16, triton.next_power_of_2(m))), 64
    tile = step(width, groups, 128 if bm <= 32 else 64)
    programs = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    split = 1
    while bm <= 64 and programs * split < units and split < 16 and k // (2 * split) >= 4 * tile:
        split *= 2
    return Config(bm, bn, tile, split, 8 if bm >= 64 else 4, 3 if bm >= 32 else 4)


def candidates(table: Config) -> list[Config]:
    """What to measure beside the table's: all that leaves the order of every sum as it is, which
    ``tile`` and ``split`` are, and the instruction, which ``bm`` decides."""
    columns = (2, 4, 8, 16) if table.bm == 1 else (32, 64, 128)
    how = ((4, 3),) if table.bm == 1 else ((4, 3), (4, 4), (4, 5), (8, 3), (8, 4))
    return [replace(table, bn=bn, warps=w, stages=s) for bn in columns for w, s in how]


def _dot(x: Tensor) -> tl.dtype:
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def product(x: Tensor, w: Planes, bias: Tensor | None, out: Tensor, c: Config) -> None:
    """``x [m, k] @ w.T + bias -> out [m, n]``, contiguous, in the dtype of ``x``."""
    m, options = x.shape[0], {"FLOAT": FLOATS[x.dtype], "BIAS": bias is not None}
    if m == 1:
        _row[(triton.cdiv(w.n, c.bn),)](
            x, w.codes, w.scale, w.zero, bias, out, w.n, **w.constants, **options, BN=c.bn,
            TILE=c.tile, **c.launch,
        )  # fmt: skip
        return
    parts = x.new_empty((c.split, m, w.n), dtype=torch.float32) if c.split > 1 else None
    grid = (triton.cdiv(m, c.bm), triton.cdiv(w.n, c.bn), c.split)
    _tile[grid](
        x, w.codes, w.scale, w.zero, bias, out, parts, None, m, w.n, **w.constants, **options,
        EXPERTS=False, SPLIT=c.split, DOT=_dot(x), BM=c.bm, BN=c.bn, TILE=c.tile, **c.launch,
    )  # fmt: skip
    if c.split > 1:
        size = 1024
        _sum[(triton.cdiv(m * w.n, size),)](
            parts, bias, out, w.n, m * w.n, **options, SPLIT=c.split, SIZE=size, **FUSED
        )


def grouped(x: Tensor, w: Planes, offsets: Tensor, out: Tensor, c: Config) -> None:
    """Rows ``offsets[e] : offsets[e + 1]`` of ``x [t, k]`` times expert e: ``out [t, n]``.

    Nothing is read back from the device: the grid has room for the worst case, and programs without
    rows end at once.
    """
    t, experts = x.shape[0], offsets.numel() - 1
    tiles = _tiles_of_experts(offsets, c.bm, triton.cdiv(t, c.bm) + experts)
    _tile[(tiles.shape[0], triton.cdiv(w.n, c.bn), 1)](
        x, w.codes, w.scale, w.zero, None, out, None, tiles, t, w.n, **w.constants,
        FLOAT=FLOATS[x.dtype], BIAS=False, EXPERTS=True, SPLIT=1, DOT=_dot(x), BM=c.bm, BN=c.bn,
        TILE=c.tile, **c.launch,
    )  # fmt: skip


def _tiles_of_experts(offsets: Tensor, bm: int, programs: int) -> Tensor:
    """i32 ``[programs, 3]``: expert, first row, past-last row of the expert; none: the same."""
    counts = offsets.diff()
    ends = (-(-counts // bm)).cumsum(0)
    index = torch.arange(programs, device=offsets.device)
    expert = torch.searchsorted(ends, index, right=True).clamp(max=len(counts) - 1)
    before = torch.where(expert > 0, ends[expert - 1], 0)
    last = offsets[expert + 1]
    first = torch.minimum(offsets[expert] + (index - before) * bm, last)
    return torch.stack((expert, first, last), 1).to(torch.int32)


def decoded(w: Planes, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[n, k]``, rounded to ``dtype``."""
    out = torch.empty(w.n, w.k, dtype=dtype, device=w.codes.device)
    tile, rows = step(w.width, w.scale.shape[1], PAD), 16
    _decode[(triton.cdiv(w.n, rows), triton.cdiv(w.k, tile))](
        w.codes,
        w.scale,
        w.zero,
        out,
        w.n,
        **w.constants,
        FLOAT=FLOATS[dtype],
        BN=rows,
        TILE=tile,
        **FUSED,
    )
    return out
