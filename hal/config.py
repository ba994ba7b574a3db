# SPDX-License-Identifier: Apache-2.0
"""The environment switches, all of them. Read at each decision, so that tests can set them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_BACKEND: ContextVar[str | None] = ContextVar("backend", default=None)


def backend() -> str:
    """``HAL_BACKEND``: serve everything from this backend only (``reference``, ``cpu``, ...), or
    from any but this one (``-cpu``); `only` comes before it."""
    chosen = _BACKEND.get()
    return os.environ.get("HAL_BACKEND", "") if chosen is None else chosen


def excludes(wanted: str, name: str) -> bool:
    """Whether a value of `backend` leaves out the backend called so."""
    if not wanted:
        return False
    return name == wanted[1:] if wanted.startswith("-") else name != wanted


@contextmanager
def only(name: str) -> Iterator[None]:
    """``HAL_BACKEND`` for what is prepared within, in this thread."""
    token = _BACKEND.set(name)
    try:
        yield
    finally:
        _BACKEND.reset(token)


def kernel() -> str:
    """``HAL_KERNEL``: only kernels whose name matches this glob, and the reference."""
    return os.environ.get("HAL_KERNEL", "")


def cache() -> Path:
    """``$XDG_CACHE_HOME/autoround``, or the same below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoround"


def isa() -> str:
    """``HAL_ISA``: the instruction set native CPU code may use (``scalar``, ``avx2``, ...)."""
    return os.environ.get("HAL_ISA", "")
