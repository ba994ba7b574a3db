# SPDX-License-Identifier: Apache-2.0
"""Sums that tell one piece of memory from another, at about the speed of reading it.

Not for adversaries: for files that change, disks that err, models that do not repeat themselves.
"""

import torch
from torch import Tensor

from hal.backends import cpu

LANES = 2048
FACTOR = 0x5851F42D4C957F2D  # 5 modulo 8: no two words of a lane can make up for each other


def sums(x: Tensor) -> Tensor:
    """``[LANES]`` i64 of a flat uint8 tensor in the host's memory, zeros after its end.

    Lane j: ``sum of w[i LANES + j] FACTOR^(n - 1 - i)`` over its n 32-bit words, modulo 2^64.
    """
    found = torch.zeros(LANES, dtype=torch.int64)
    if cpu.probe() is None:
        cpu.native().digest(x.data_ptr(), x.numel(), found.data_ptr())
        return found
    return reference(x)


def reference(x: Tensor) -> Tensor:
    """`sums` in torch."""
    found = torch.zeros(LANES, dtype=torch.int64)
    padded = torch.nn.functional.pad(x, (0, -x.numel() % (4 * LANES)))
    for row in padded.view(torch.int32).view(-1, LANES):
        torch.add(row, found, alpha=FACTOR, out=found)
    return found
