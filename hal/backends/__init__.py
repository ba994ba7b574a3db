# SPDX-License-Identifier: Apache-2.0
"""The backends: every module in this folder is one. ``reference`` serves any device torch knows."""

import importlib
import pkgutil
from functools import cache
from typing import cast

from hal.layout import LAYOUTS, Layout
from hal.registry import Backend, Kernel

REFERENCE = "reference"


@cache
def backends() -> tuple[Backend, ...]:
    """All backends: those for one kind of device before those for several, the reference last."""
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    found = [cast(Backend, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return tuple(sorted(found, key=lambda b: (not b.KINDS, len(b.KINDS), b.NAME)))


def backend_names() -> list[str]:
    """What `hal.config.backend` may name: backends that this machine can use."""
    return [b.NAME for b in backends() if b.probe() is None]


@cache
def serving(kind: str) -> tuple[Backend, ...]:
    """Usable backends that serve a device of this kind, best first, the reference last."""
    return tuple(b for b in backends() if (not b.KINDS or kind in b.KINDS) and b.probe() is None)


@cache
def kernels(kind: str) -> tuple[Kernel, ...]:
    """Rows that may serve a device of this kind, best first; the reference rows close the list."""
    return tuple(row for b in serving(kind) for row in b.KERNELS)


@cache
def native_layout(name: str) -> Layout:
    """A layout by name, file layouts and the backends' native ones alike."""
    native = {row.name: row for b in backends() for row in b.LAYOUTS}
    return {**LAYOUTS, **native}[name]
