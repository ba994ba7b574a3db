# SPDX-License-Identifier: Apache-2.0
"""Host memory for what is large, in pages of 2 MB."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20
#: Bytes from which such pages waste little. What malloc does not happen to keep comes fresh from
#: the system, where the first touch of a page of 4 KB takes 1 to 2 us: on one thread 9 of the 13 ms
#: of a `dequantize` of 4096 x 4096, 13 of the 32 of quantizing and packing it in 8 bits.
LARGE = 4 << 20


def host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return torch.empty(shape, dtype=dtype)
    return pages(nbytes).view(dtype).view(shape)


def pages(nbytes: int) -> Tensor:
    """Bytes in pages of 2 MB where the system grants them, else as they come."""
    region = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + nbytes]
