# SPDX-License-Identifier: Apache-2.0
"""Blocks of columns times Sylvester's matrix: butterflies in the order of `hal.codec.hadamard`."""

import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.codec import EXACT, FLOATS, stored, wide

TILE = 2048  #: numbers of a program, as long as a block is no larger
MOST = 4096  #: columns of a block: 32 numbers a thread


@triton.jit
def _hadamard(x, count, factor, FLOAT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)
    mask = (block < count)[:, None]
    value = wide(tl.load(x + at, mask, 0.0))
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(value, [ROWS, BLOCK >> (stage + 1), 2, 1 << stage])
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
        value = tl.reshape(pairs, [ROWS, BLOCK])
    value = stored(value * factor, FLOAT)
    tl.store(x + at, value.to(x.dtype.element_ty), mask)


def hadamard_(x: Tensor, block: int) -> None:
    """`hal.hadamard_` of a contiguous ``[m, k]`` whose rows are whole blocks."""
    count, rows = x.numel() // block, max(1, TILE // block)
    if count:
        _hadamard[(triton.cdiv(count, rows),)](
            x, count, block**-0.5, FLOAT=FLOATS[x.dtype], BLOCK=block,
            STAGES=block.bit_length() - 1, ROWS=rows, num_warps=4, **EXACT,
        )  # fmt: skip
