# SPDX-License-Identifier: Apache-2.0
"""The values that travel between the verbs: quantized matrices and tunable parameters."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hal.spec import Spec


class Part(NamedTuple):
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class QTensor:
    """A quantized ``[N, K]`` matrix in a named layout.

    Layout ``plain``: ``codes`` u8 [N, K] (unsigned levels), ``scale`` [N, G] in the spec's scale
    dtype, ``zero`` u8 [N, G] when asymmetric. Other layouts name their own parts (``hal.layout``).
    ``experts``: E matrices stacked along N, so N = E * rows.
    ``perm`` [K] i32: stored column j is column ``perm[j]`` of the matrix (`ordered`); None = j.
    """

    spec: Spec
    shape: tuple[int, int]
    layout: str
    parts: dict[str, Tensor]
    experts: int = 1
    perm: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    def with_parts(self, layout: str, parts: dict[str, Tensor]) -> "QTensor":
        return replace(self, layout=layout, parts=parts)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Rows ``start:stop`` of a plain tensor, sharing memory."""
        if self.layout != "plain":
            raise ValueError(f"rows() needs layout plain, not {self.layout}; call hal.pack first")
        parts = {name: t[start:stop] for name, t in self.parts.items()}
        return QTensor(self.spec, (stop - start, self.shape[1]), "plain", parts, perm=self.perm)

    def ordered(self, g_idx: Tensor) -> "QTensor":
        """Act-order: a plain tensor whose column i belongs to group ``g_idx[i]`` (GPTQ's desc_act),
        with its columns sorted by group and ``perm`` to tell.

        ``g_idx`` [K] i32: every group its full number of columns, the last group the rest. Raises
        ValueError otherwise.
        """
        if self.layout != "plain" or self.perm is not None:
            raise ValueError(f"ordered() needs layout plain without perm, not {self.layout}")
        k, width = self.shape[1], self.spec.width(self.shape[1])
        perm = g_idx.argsort(stable=True)
        if g_idx.shape != (k,) or not torch.equal(
            g_idx[perm].long(), torch.arange(k, device=g_idx.device) // width
        ):
            raise ValueError(f"g_idx must give {width} of the {k} columns to every group")
        parts = {**self.parts, "codes": self.parts["codes"][:, perm].contiguous()}
        return replace(self, parts=parts, perm=perm.to(torch.int32))


@dataclass(slots=True)
class Params:
    """What tuning may move, on the weight's device, all f32.

    ``v`` [N, K] rounding offset (None = zero), ``lo``/``hi`` [N, G] range multipliers in [0, 1],
    ``amin``/``amax`` [N, G] the frozen initial range, amin <= 0 <= amax.
    """

    v: Tensor | None
    lo: Tensor
    hi: Tensor
    amin: Tensor
    amax: Tensor
