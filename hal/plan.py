# SPDX-License-Identifier: Apache-2.0
"""`prepare`: choose the kernels once, lay the weight out for them once, then only multiply."""

from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hal import device as devices
from hal.qtensor import QTensor
from hal.registry import Case, Kernel, select
from hal.spec import Act, Spec

#: M buckets asked at prepare; the kernel of a bucket serves all M up to it, the last one any M.
PLANNED = (4, 8, 16, 64, 128, 256, 512, 1024)


_tokens = count()


@dataclass(slots=True, weakref_slot=True)
class Weight:
    """A weight ready for one device: native layout, opaque to everyone but its kernels.

    ``kernels``: (largest M, row) in rising order. ``act``: how activations may be encoded on the
    way, None = exact products. ``parts``: the native tensors, kept alive here.
    ``perm`` [K] i32: the order in which the stored columns take those of x (`QTensor.perm`).
    ``members``: weights that view rows of this one (`hal.join`). ``handle``: whatever the backend
    wants to look up once per weight. ``token``: its name in graphs of ``torch.compile``.
    """

    spec: Spec
    shape: tuple[int, int]
    experts: int
    dtype: torch.dtype
    layout: str
    parts: dict[str, Tensor]
    kernels: tuple[tuple[int, Kernel], ...]
    act: Act | None = None
    perm: Tensor | None = None
    members: "tuple[Weight, ...]" = ()
    handle: Any = None
    token: int = field(default_factory=_tokens.__next__, init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        WEIGHTS[self.token] = self
        self.device = next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    def kernel(self, m: int) -> Kernel:
        """The row that multiplies ``m`` rows of activations."""
        for limit, row in self.kernels:
            if m <= limit:
                return row
        return self.kernels[-1][1]


#: Every weight alive, by token.
WEIGHTS: WeakValueDictionary[int, Weight] = WeakValueDictionary()


def plan_kernels(
    spec: Spec, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, Kernel], ...]:
    """What `prepare` would choose for an exact product: (largest M, kernel) in rising order."""
    return plan(QTensor(spec, shape, "plain", {}), dtype, device)


def plan(
    q: QTensor, dtype: torch.dtype, target: torch.device, act: Act | None = None
) -> tuple[tuple[int, Kernel], ...]:
    """Kernels for every planned M, all reading the layout that the first answer reads."""
    op = "qgemm_grouped" if q.experts > 1 else "qgemm"
    rows: list[tuple[int, Kernel]] = []
    for m in PLANNED:
        caps = devices.caps(target)
        case = Case(op, q.spec, dtype, *q.shape, caps, m=m, act=act, experts=q.experts)
        row = select(case)
        rows.append((m, row if not rows or row.layout == rows[0][1].layout else rows[0][1]))
    return tuple(rows)
