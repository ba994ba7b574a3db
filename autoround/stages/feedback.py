# SPDX-License-Identifier: Apache-2.0
"""Rounding in closed form: each layer in turn made to undo the errors of all before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

import hal
from autoround.stages.inputs import Moments, dataflow, gain, moments
from autoround.stages.quadratic import Grid, damped, descend, feedback, refit
from autoround.stages.task import BlockTask, LayerTask


@dataclass(frozen=True, slots=True)
class Feedback:
    """For each layer, in the order of their use, on the samples that are not held out:

    1. The weight T whose output on the quantized chain is nearest to what it should be: the float
       layer's own output, or, where the block's output follows the layer's (o_proj, down_proj),
       whatever brings the block's output nearest to the float block's. Least squares, with
       ``ridge`` of the mean diagonal of H = X^T X.
    2. A range searched for every group, weighted by the diagonal of H (``grid`` candidates).
    3. Error feedback (GPTQ, ``damp``), then ``rounds`` of new scales for the codes and ``sweeps``
       of coordinate descent over the codes, all toward least tr((Q - T) H (Q - T)^T).

    Layers that no sample reaches and fused experts keep the parameters they have. The weight of
    every other layer becomes one that rounds to the codes found.
    """

    batch_size: int
    grid: int = 100
    ridge: float = 0.03
    damp: float = 0.01
    rounds: int = 5
    sweeps: int = 2

    def run(self, task: BlockTask) -> None:
        assert task.x is not None
        batches = task.x.batches(task.seen, self.batch_size)
        done = task.fixed
        for names in dataflow(task, batches[0]):
            gains = gain(task, names[0], done, batches[0][:1]) if len(names) == 1 else None
            found = moments(task, names[0], done, batches, gains)
            if found is None:
                continue
            for alike in _by_spec(task.layers, names):
                self._round([task.layers[name] for name in alike], found)
            for name in names:
                layer = task.layers[name]
                done[name] = hal.qdq(layer.w, layer.ready, layer.spec).to(layer.dtype)

    def _round(self, layers: Sequence[LayerTask], m: Moments) -> None:
        """Layers of one spec and one input, as one matrix."""
        spec, w = layers[0].spec, torch.cat([layer.w for layer in layers]).float()
        t = _target(w, m, self.ridge)
        range_of = hal.search(t, spec, importance=m.h.diagonal().contiguous(), grid=self.grid)
        grid = Grid.of(t, range_of, spec)
        q = feedback(t, m.h, grid, self.damp)
        for _ in range(self.rounds):
            q, grid = refit(q, t, m.h, grid)
            for _ in range(self.sweeps):
                q = descend(q, t, m.h, grid)
        p = grid.params()
        for rows, layer in zip(_rows(layers), layers, strict=True):
            layer.w = q[rows].contiguous()  # on the grid: rounding gives it back exactly
            layer.params = hal.Params(
                None, *(x[rows].contiguous() for x in (p.lo, p.hi, p.amin, p.amax))
            )


def _target(w: Tensor, m: Moments, ridge: float) -> Tensor:
    """The weight that makes up for what is missing, by least squares."""
    back = torch.linalg.solve(damped(m.h, ridge), m.miss.double().t()).t()
    change: Tensor = back if m.of_output else w.double() @ back
    return w + change.float()


def _rows(layers: Sequence[LayerTask]) -> list[slice]:
    """Where each layer lies in the matrix of them all."""
    ends = list(accumulate(len(layer.w) for layer in layers))
    return [slice(end - len(layer.w), end) for end, layer in zip(ends, layers, strict=True)]


def _by_spec(layers: Mapping[str, LayerTask], names: Sequence[str]) -> list[list[str]]:
    groups: dict[hal.Spec, list[str]] = {}
    for name in names:
        groups.setdefault(layers[name].spec, []).append(name)
    return list(groups.values())
