# SPDX-License-Identifier: Apache-2.0
"""Where hidden states lie between blocks: side by side, in memory or in a file mapped into it."""

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autoround.errors import InputError
from hal.device import pinned

#: Hidden states of all samples that exist at one time: both chains' inputs, the float block's
#: outputs, and what models keep of the embeddings.
COPIES = 4
ALIGN = 64  # bytes between rows are a multiple of this
#: Passes over a batch from one rest of the files to the next: at 1, a run takes 1.2 times as long.
REST_EVERY = 4
#: Passes until what the C library keeps is given back: 656 MB at 32, 668 at 128, 714 at none, where
#: the processor seconds of a run were 44.1, 42.3 and 42.6.
TRIM_EVERY = 64
#: Names that glibc's malloc.h has for numbers.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


class Store:
    """``n`` tensors of one shape and dtype in one piece of memory, or of a file in ``folder``.

    The file has no name: it is gone with the process. Rows are tensors of their own over the shared
    memory, so that it can be told whether anyone still holds one.
    """

    def __init__(self, n: int, like: Tensor, folder: Path | None, device: torch.device) -> None:
        """``device``: what shall read the rows."""
        self.shape, self.dtype = like.shape, like.dtype
        self._stride = -(-like.numel() * like.element_size() // ALIGN) * ALIGN
        self._rows: dict[int, StorageWeakRef] = {}
        if folder is None:
            self._memory = mmap.mmap(-1, n * self._stride)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                _claim(file.fileno(), n * self._stride)
                self._memory = mmap.mmap(file.fileno(), n * self._stride)
        self.in_file = folder is not None
        if not self.in_file:
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            weakref.finalize(self, pinned(whole, device))

    def fits(self, value: Tensor) -> bool:
        """Whether a row can hold it."""
        alike = value.shape == self.shape and value.dtype == self.dtype
        return alike and value.device.type == torch.empty(0).device.type

    @property
    def held(self) -> bool:
        """Whether any row still is someone's tensor."""
        self._rows = {i: row for i, row in self._rows.items() if not row.expired()}  # type: ignore[no-untyped-call]
        return bool(self._rows)

    def put(self, i: int, value: Tensor) -> Tensor:
        """A copy of ``value`` in row ``i``; elsewhere, if it has another shape than the rows."""
        if not self.fits(value):
            return value.clone()
        row = torch.frombuffer(
            self._memory, dtype=self.dtype, count=value.numel(), offset=i * self._stride
        )
        self._rows[i] = StorageWeakRef(  # type: ignore[no-untyped-call]
            row.untyped_storage()
        )
        return row.view(self.shape).copy_(value)

    def rest(self) -> None:
        """Give back the memory of a file's pages; what they hold stays and comes back when read."""
        assert self.in_file
        self._memory.madvise(mmap.MADV_DONTNEED)


class Pool:
    """Stores that are used again as soon as nobody holds a row of them."""

    def __init__(self, folder: Path, spill: bool, device: torch.device) -> None:
        """``spill``: into files in ``folder`` in any case, not only where memory would not do.
        ``device``: what shall read the tensors."""
        self._folder, self._spill, self._device = folder, spill, device
        self._stores: list[Store] = []
        self._passes = 0

    def take(self, n: int, like: Tensor) -> Store:
        """A store for ``n`` tensors such as ``like``, which nobody else uses."""
        for store in self._stores:
            if store.fits(like) and not store.held:
                return store
        size = COPIES * n * like.numel() * like.element_size()
        spill = self._spill or size > available_bytes() // 2
        self._stores.append(Store(n, like, self._folder if spill else None, self._device))
        return self._stores[-1]

    def release(self) -> None:
        """Give up every store that nobody holds a row of."""
        self._stores = [store for store in self._stores if store.held]
        trim()

    def rest(self) -> None:
        """After a pass: now and then, give back files' pages and all that the C library keeps."""
        self._passes += 1
        filed = [store for store in self._stores if store.in_file]
        if self._passes % (REST_EVERY if filed else TRIM_EVERY):
            return
        for store in filed:
            store.rest()
        trim()


def _claim(file: int, size: int) -> None:
    """Room for a whole file: written through memory, a full disk would end the process."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            os.ftruncate(file, size)  # a file system that cannot promise room
            return
        raise InputError(
            f"no room for {size / 1e6:.0f} MB of hidden states beside the output; free it, or "
            "take fewer --nsamples or a shorter --seqlen"
        ) from None


def keep_freed() -> None:
    """Have the C library keep what a pass frees for the next one, up to 64 MB, from now on (glibc
    only); `trim` gives it back.

    By its own rule it gives back the top of its memory over and over, and a pass is given fresh
    pages: 90 ms for a block of hidden 1024 and 1024 tokens on one core, instead of 73.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, 1 << 26)
        mallopt(MMAP_THRESHOLD, 1 << 24)


def trim() -> None:
    """Give back what the C library keeps of freed memory (glibc only)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Memory that could be had now, on this machine and in this control group."""
    found: list[int] = [1 << 62]
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(_value(lines, "MemAvailable:")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    return min(found)


def _value(lines: Iterable[str], key: str) -> str:
    return next(line.split()[1] for line in lines if line.startswith(key))
