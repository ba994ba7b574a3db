# SPDX-License-Identifier: Apache-2.0
"""Devices as facts. With `hal.backends`, the only place that knows devices by name."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hal import memory
from hal.backends import backends, serving
from hal.registry import Caps


@dataclass(frozen=True, slots=True)
class Device:
    """One usable device: where tensors go, its facts, the backends that serve it, best first."""

    torch: torch.device
    caps: Caps
    served_by: tuple[str, ...]


@cache
def caps(device: torch.device) -> Caps:
    """Facts about a device, from the best backend that serves it."""
    return serving(device.type)[0].caps(device)


def devices() -> list[Device]:
    """Every device of this machine, the accelerator (if torch has one) first."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found[:0] = [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return [Device(d, caps(d), tuple(b.NAME for b in serving(d.type))) for d in found]


def unavailable() -> list[tuple[str, str]]:
    """Backends that cannot be used here, with the reason."""
    return [(b.NAME, reason) for b in backends() if (reason := b.probe()) is not None]


def resolve(device_map: str | int | None) -> torch.device:
    """The device the user named: ``auto``/None = first of `devices`, an index, or a torch name.

    Raises ValueError naming what exists here.
    """
    known = devices()
    if device_map in (None, "auto"):
        return known[0].torch
    text = str(device_map)
    accelerators = [d.torch for d in known if d.torch.index is not None]
    if text.isdigit() and (int(text) < len(accelerators) or (not accelerators and text == "0")):
        return accelerators[int(text)] if accelerators else known[0].torch
    for d in known:
        if text in (str(d.torch), d.torch.type):
            return d.torch
    names = ", ".join(str(d.torch) for d in known)
    raise ValueError(f"device {text!r} is not on this machine; choose auto or one of: {names}")


def spread(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[torch.device]:
    """A device for each of some pieces that follow each other: neighbours together, every device
    filled in proportion to its memory."""
    rooms = [caps(device).memory for device in devices]
    ends = [sum(rooms[: i + 1]) / sum(rooms) for i in range(len(rooms))]
    found, done, whole = [], 0.0, sum(sizes) or 1
    for size in sizes:
        middle = (done + size / 2) / whole
        found.append(next(i for i, end in enumerate(ends) if middle <= end or end == ends[-1]))
        done += size
    return [devices[i] for i in found]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Lets torch, and what asks it, work on one of several devices of a kind."""
    guard: AbstractContextManager[Any] = torch.accelerator.device_index(device.index)
    return guard


def moved(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the caller does not wait for it to arrive there."""
    return t if t.device == device else t.to(device, non_blocking=True)


def gathered(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors that differ in their first dimension only, one after another on a device.

    Rows of `pinned` memory go there on their own: the caller does not wait for them.
    """
    if rows[0].device == device:
        return torch.cat(list(rows))
    whole = torch.empty(
        (sum(len(row) for row in rows), *rows[0].shape[1:]), dtype=rows[0].dtype, device=device
    )
    pieces: Sequence[Tensor] = torch.split(whole, [len(row) for row in rows])
    for place, row in zip(pieces, rows, strict=True):
        place.copy_(row, non_blocking=True)
    return whole


def pinned(memory: Tensor, device: torch.device) -> Callable[[], None]:
    """Let a device read host memory by itself, where it can; returns what undoes that."""
    if device.type != "cuda" or not memory.nbytes:
        return lambda: None
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    at = memory.data_ptr()
    if int(runtime.cudaHostRegister(at, memory.nbytes, 0)):
        return lambda: None  # more than the system lets one lock: copies go through a buffer
    return lambda: runtime.cudaHostUnregister(at)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor."""
    if device.type == "cpu":
        return memory.host(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def tokens_at_once(device: torch.device) -> int:
    """Tokens to send through a block together: enough to keep the device busy.

    On a CPU 1024 take no longer than 4096 (.97 of a run's processor seconds) and less room.
    """
    return 1024 if device.type == "cpu" else 16384
