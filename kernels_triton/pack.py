# SPDX-License-Identifier: Apache-2.0
"""Codes to the 32-bit words of file layouts and back (formats.md 0.4): bits only, so exact.

``BITS`` words hold 32 values; in AWQ's order one word holds 8 of 4 bits. ``row`` counts in the
direction that is not packed.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.codec import FUSED


class Strides(NamedTuple):
    """How far rows and neighbours are apart: in the codes and in the words."""

    code_row: int
    code: int
    word_row: int
    word: int


@triton.jit
def _values(AWQ: tl.constexpr, COUNT: tl.constexpr):
    """Which value each field of a word holds."""
    i = tl.arange(0, COUNT)
    return (2 * i) % 8 + i // 4 if AWQ else i


@triton.jit
def _block(rows, blocks, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return index % rows, index // rows, index < rows * blocks


@triton.jit
def _pack(codes, words, rows, blocks, code_row, code, word_row, word, BITS: tl.constexpr,
          AWQ: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    row, block, mask = _block(rows, blocks, SIZE)
    at = row[:, None] * code_row + (block[:, None] * COUNT + _values(AWQ, COUNT)[None, :]) * code
    value = tl.load(codes + at, mask[:, None], 0).to(tl.uint32)
    for w in tl.static_range(COUNT * BITS // 32):
        shift = (tl.arange(0, COUNT) * BITS - 32 * w)[None, :]
        up = value << tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        down = value >> tl.minimum(tl.maximum(-shift, 0), 31).to(tl.uint32)
        part = tl.where(shift >= 0, up, down)
        part = tl.where((shift < 32) & (shift > -BITS), part, 0)
        where = row * word_row + (block * (COUNT * BITS // 32) + w) * word
        tl.store(words + where, tl.sum(part, axis=1).to(tl.int32, bitcast=True), mask)


@triton.jit
def _unpack(codes, words, rows, blocks, code_row, code, word_row, word, BITS: tl.constexpr,
            AWQ: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    row, block, mask = _block(rows, blocks, SIZE)
    bit = tl.arange(0, COUNT) * BITS
    first, shift = bit // 32, (bit % 32).to(tl.uint32)
    at = row[:, None] * word_row + (block[:, None] * (COUNT * BITS // 32) + first[None, :]) * word
    low = tl.load(words + at, mask[:, None], 0).to(tl.uint32, bitcast=True)
    value = low >> shift[None, :]
    if 32 % BITS:
        over = (shift + BITS > 32)[None, :]
        high = tl.load(words + at + word, mask[:, None] & over, 0).to(tl.uint32, bitcast=True)
        value = value | tl.where(over, high << ((32 - shift) % 32)[None, :], 0)
    value = value & ((1 << BITS) - 1)
    at = row[:, None] * code_row + (block[:, None] * COUNT + _values(AWQ, COUNT)[None, :]) * code
    tl.store(codes + at, value.to(tl.uint8), mask[:, None])


def pack(codes: Tensor, words: Tensor, bits: int, rows: int, strides: Strides, awq: bool) -> None:
    """``codes`` u8 into ``words`` i32; ``rows``: the length of the direction not packed."""
    _launch(_pack, codes, words, bits, rows, strides, awq)


def unpack(codes: Tensor, words: Tensor, bits: int, rows: int, strides: Strides, awq: bool) -> None:
    """Inverse of `pack`."""
    _launch(_unpack, codes, words, bits, rows, strides, awq)


def _launch(
    kernel: triton.JITFunction, codes: Tensor, words: Tensor, bits: int, rows: int,
    strides: Strides, awq: bool,
) -> None:  # fmt: skip
    count, size = 8 if awq else 32, 64
    blocks = codes.numel() // rows // count
    grid = (triton.cdiv(rows * blocks, size),)
    kernel[grid](
        codes, words, rows, blocks, *strides, BITS=bits, AWQ=awq, COUNT=count, SIZE=size, **FUSED
    )
