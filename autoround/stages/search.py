# SPDX-License-Identifier: Apache-2.0
"""The starting point: a range for every group."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import hal
from autoround.stages.inputs import watching
from autoround.stages.task import BlockTask

#: Candidates of `hal.search` above 2 bits: multiples 1 / (1 - 0.75 k / 100), k = -100 .. 100.
GRID = 200
#: Inputs this small count as none.
SILENT = 1e-30


class Search:
    """Initial range of every weight of a block: min-max. Alone, it is rounding to nearest."""

    def run(self, task: BlockTask) -> None:
        for layer in task.layers.values():
            layer.params = hal.search(layer.w, layer.spec)


@dataclass(frozen=True, slots=True)
class WeightedSearch:
    """The multiple of the min-max range with the least error, columns weighted by their inputs.

    Weights: sums of squares of the float chain's inputs (algorithms.md 2.1, 3.2). Layers without
    inputs of their own count all columns alike.
    """

    batch_size: int

    def run(self, task: BlockTask) -> None:
        squares = self._squares(task)
        for name, layer in task.layers.items():
            weights = squares.get(name)
            if weights is not None:
                weights = filled(weights, layer.spec)
            search = _search2 if layer.spec.bits == 2 else _search
            found = search(layer.w, layer.spec, weights)
            layer.params = _one_sided(found) if layer.spec.symmetric else found

    def _squares(self, task: BlockTask) -> dict[str, Tensor]:
        assert task.floats is not None
        sums: dict[str, Tensor] = {}

        def seen(name: str, x: Tensor) -> None:
            found = x.detach().float().flatten(0, -2).pow(2).sum(0)
            sums[name] = sums[name] + found if name in sums else found

        with torch.no_grad(), watching(task, task.own, seen):
            for batch in task.floats.batches(task.floats.indices, self.batch_size):
                task.forward(task.floats.gather(batch), {})
        return sums


def _one_sided(p: hal.Params) -> hal.Params:
    """The same symmetric grid, told by the side that decides it: tuning cannot turn its sign."""
    below = -p.amin > p.amax
    amin, amax = torch.where(below, p.amin, 0.0), torch.where(below, 0.0, p.amax)
    return hal.Params(None, p.lo, p.hi, amin, amax)


def filled(weights: Tensor, spec: hal.Spec) -> Tensor:
    """Column weights ``[K]`` without zeros: a group's zeros become the mean of its others.

    A group with more than 16 (8 at 2 bits) counts all its columns alike.
    """
    width, few = spec.width(len(weights)), 8 if spec.bits == 2 else 16
    out = weights.clone()
    for start in range(0, len(out), width):
        group = out[start : start + width]
        silent = group <= SILENT
        count = int(silent.sum())
        if count > few or count == len(group):
            group.fill_(1.0)
        elif count:
            group[silent] = group[~silent].mean()
    return out


def _search(w: Tensor, spec: hal.Spec, weights: Tensor | None) -> hal.Params:
    return hal.search(w, spec, importance=weights, grid=GRID)


def _search2(w: Tensor, spec: hal.Spec, weights: Tensor | None) -> hal.Params:
    """2 bits: the finer candidates 1 / (1 - k / 200), k = -90 .. 90."""
    start = hal.search(w, spec)
    least = torch.full_like(start.amin, torch.inf)
    best = torch.ones_like(start.amin)
    for factor in _factors2():
        tried = hal.Params(None, start.lo, start.hi, start.amin * factor, start.amax * factor)
        error = (hal.qdq(w, tried, spec).float() - w.float()).pow(2)
        error = _by_group(error if weights is None else error * weights, spec)
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    return hal.Params(None, start.lo, start.hi, start.amin * best, start.amax * best)


def _factors2() -> Iterator[float]:
    yield 1.0
    yield from (1 / (1 - k / 200) for k in range(-90, 91) if k)


def _by_group(x: Tensor, spec: hal.Spec) -> Tensor:
    """``[N, K] -> [N, G]``, sums over each group."""
    width, groups = spec.width(x.shape[1]), spec.groups(x.shape[1])
    x = torch.nn.functional.pad(x, (0, groups * width - x.shape[1]))
    return x.view(len(x), groups, width).sum(-1)
