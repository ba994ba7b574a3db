# SPDX-License-Identifier: Apache-2.0
"""Devices as facts. With `hal.backends`, the only place that knows devices by name."""

from dataclasses import dataclass
from functools import cache

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
