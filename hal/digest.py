# SPDX-License-Identifier: Apache-2.0
"""Sums that tell one piece of memory from another, at about the speed of reading it.

Not for adversaries: for files that change, disks that err, models that do not repeat themselves.
"""

import zlib
from functools import cache

import torch
from torch import Tensor

from hal.backends import cpu

LANES = 2048
FACTOR = 0x5851F42D4C957F2D  # 5 modulo 8: no two words of a lane can make up for each other


def sums(x: Tensor) -> tuple[Tensor, bool]:
    """``[LANES]`` i64 of the bytes of a flat tensor in the host's memory, zeros after its end, and
    whether its numbers are finite (f64, f32, bf16, f16; of others it is True).

    Lane j: ``sum of w[i LANES + j] FACTOR^(n - 1 - i)`` over its n 32-bit words, modulo 2^64.
    """
    if cpu.probe() is None and x.dtype != torch.float64:
        found = torch.zeros(LANES, dtype=torch.int64)
        dtype, at = cpu.DTYPES.get(x.dtype, -1), (x.data_ptr(), x.nbytes)
        return found, cpu.native().digest(cpu.isa(), *at, dtype, found.data_ptr())
    number = x.dtype == torch.float64 or x.dtype in cpu.DTYPES
    return reference(x.view(torch.uint8)), not number or bool(x.isfinite().all())


def crc32(x: Tensor, before: int = 0) -> int:
    """`zlib.crc32` of the bytes of a contiguous tensor of the host, 3 times as fast.

    ``before``: the sum of bytes that these follow.
    """
    data = x.reshape(-1).view(torch.uint8)
    if _folds():
        return int(cpu.native().crc32(before, data.data_ptr(), data.numel()))
    return zlib.crc32(memoryview(data.numpy()), before)  # type: ignore[arg-type]


@cache
def _folds() -> bool:
    """Whether this machine has the instructions, and they find what zlib finds."""
    if cpu.probe() is not None or not cpu.native().crc32_folds():
        return False
    data = torch.arange(1003, dtype=torch.int32).view(torch.uint8)[:4001]
    ours = cpu.native().crc32(7, data.data_ptr(), data.numel())
    return bool(ours == zlib.crc32(memoryview(data.numpy()), 7))  # type: ignore[arg-type]


def reference(x: Tensor) -> Tensor:
    """The sums of a flat uint8 tensor in torch."""
    found = torch.zeros(LANES, dtype=torch.int64)
    padded = torch.nn.functional.pad(x, (0, -x.numel() % (4 * LANES)))
    for row in padded.view(torch.int32).view(-1, LANES):
        torch.add(row, found, alpha=FACTOR, out=found)
    return found
