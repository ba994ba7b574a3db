# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves which question: ordered rows, each able to say why it cannot."""

import fnmatch
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from hal import config
from hal.block import BlockOps
from hal.layout import Layout
from hal.spec import Act, Spec


@dataclass(frozen=True, slots=True)
class Caps:
    """A device, as facts: nothing else asks the vendor anything."""

    kind: str
    name: str
    arch: str
    features: frozenset[str]
    units: int
    memory: int


def described(device: torch.device) -> Caps:
    """What torch itself tells of a device: enough for kernels that are compiled for it."""
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Caps(device.type, device.type, "", frozenset(), os.cpu_count() or 1, pages)
    found = module.get_device_properties(device)
    units = getattr(found, "multi_processor_count", 0) or getattr(found, "max_compute_units", 1)
    arch = getattr(found, "gcnArchName", "").split(":")[0]
    if not arch and hasattr(found, "major"):
        arch = f"sm_{found.major}{found.minor}"
    return Caps(device.type, found.name, arch, frozenset(), units, found.total_memory)


@dataclass(frozen=True, slots=True)
class Case:
    """A question put to kernels. Holds no tensors, so it can be printed and tested.

    ``m`` is a bucket (`bucket`), 0 for verbs without activations. ``layout`` is the file layout for
    pack and unpack.
    """

    op: str
    spec: Spec
    dtype: torch.dtype
    n: int
    k: int
    caps: Caps
    m: int = 0
    act: Act | None = None
    experts: int = 1
    layout: str = "plain"


@dataclass(frozen=True, slots=True)
class Launches:
    """Of a kernel that can be launched in several ways with the same result.

    ``explain(case)``: how it would be, and where that is from. ``tune(case, device)`` measures the
    ways, keeps the fastest in the user's cache and says what it found.
    """

    explain: Callable[[Case], str]
    tune: Callable[[Case, torch.device], str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of a backend's table; position is priority.

    ``name`` is ``<backend>.<op>[_<variant>]``. ``when`` answers None (it can) or why it cannot.
    ``layout`` is the native layout a qgemm reads. ``label``: how it is shown to work (`LABELS`),
    where that is not what its backend says of all.
    """

    name: str
    op: str
    fn: Callable[..., Any]
    when: Callable[[Case], str | None] = lambda case: None
    layout: str = "plain"
    label: str | None = None
    launches: Launches | None = None


@dataclass(frozen=True, slots=True)
class Probes:
    """The most that kernels could do: ``read`` all bytes of a uint8 tensor; ``peak`` multiplies
    registers and returns the number of multiplications and additions."""

    read: Callable[[Tensor], None]
    peak: Callable[[], int]


#: How kernels are shown to work on a kind of device.
MEASURED, EMULATED, COMPILED, WRITTEN = LABELS = (
    "measured on hardware",
    "run on an emulated device",
    "compiled",
    "written",
)


class Backend(Protocol):
    """One file in ``hal/backends``: its kernels, best first, and the facts about its devices.

    ``KINDS``: the kinds of device that it serves, and how its kernels are shown to work there: a
    value of `LABELS`. None = any device that torch knows.
    """

    NAME: str
    KINDS: Mapping[str, str]
    KERNELS: tuple[Kernel, ...]
    LAYOUTS: tuple[Layout, ...]

    def probe(self) -> str | None:
        """None when usable on this machine, else the reason in words."""

    def caps(self, device: torch.device) -> Caps: ...

    def block_ops(self) -> BlockOps: ...

    def probes(self) -> Probes | None: ...


class Unsupported(RuntimeError):
    """No kernel can serve a case; the message lists every row and its reason."""


BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def bucket(m: int) -> int:
    """Smallest bucket holding ``m`` rows; 1024 stands for all larger sizes."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def explain(case: Case) -> list[tuple[Kernel, str | None]]:
    """Every row asked for ``case.op``, in priority order, with its reason (None = it can)."""
    from hal.backends import kernels

    rows = [row for row in kernels(case.caps.kind) if row.op == case.op]
    return [(row, _switched_off(row) or row.when(case)) for row in rows]


def select(case: Case) -> Kernel:
    """First row that can serve the case. Raises Unsupported with the whole argument if none can."""
    return _select(case, config.backend(), config.kernel(), config.isa())


@cache
def _select(case: Case, backend: str, kernel: str, isa: str) -> Kernel:
    rows = explain(case)
    for row, reason in rows:
        if reason is None:
            return row
    table = "\n".join(f"  {row.name}: {reason}" for row, reason in rows)
    raise Unsupported(f"no kernel for {case}\n{table}")


def _switched_off(row: Kernel) -> str | None:
    backend, pattern = config.backend(), config.kernel()
    name = row.name.split(".")[0]
    if config.excludes(backend, name):
        return f"HAL_BACKEND={backend}"
    if pattern and name != "reference" and not fnmatch.fnmatch(row.name, pattern):
        return f"HAL_KERNEL={pattern}"
    return None
