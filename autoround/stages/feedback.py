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
       whatever brings the block's output nearest to the float block's. Least squares; of
       ``ridges``, shares of the mean diagonal of H = X^T X, the one that serves the held-out
       samples best, or no change at all.
    2. A range searched for every group, weighted by the diagonal of H (``grid`` candidates).
    3. Error feedback (GPTQ), then ``rounds`` of new scales for the codes and ``sweeps`` of
       coordinate descent over the codes, all toward least tr((Q - T) H (Q - T)^T), with ``damp`` of
       its mean diagonal added to H.

    Layers that no sample reaches and fused experts keep the parameters they have. The weight of
    every other layer becomes one that rounds to the codes found.
    """

    batch_size: int
    grid: int = 100
    ridges: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    damp: float = 0.1
    rounds: int = 5
    sweeps: int = 2

    def run(self, task: BlockTask) -> None:
        assert task.x is not None
        batches = task.x.batches(task.seen, self.batch_size)
        judging = task.x.batches(task.held, self.batch_size)
        done = task.fixed
        for names in dataflow(task, batches[0]):
            gains = gain(task, names[0], done, batches[0][:1]) if len(names) == 1 else None
            found = moments(task, names[0], done, batches, gains)
            judge = moments(task, names[0], done, judging, gains) if judging else found
            if found is None:
                continue
            for alike in _by_spec(task.layers, names):
                self._round([task.layers[name] for name in alike], found, judge or found)
            for name in names:
                layer = task.layers[name]
                done[name] = hal.qdq(layer.w, layer.ready, layer.spec).to(layer.dtype)

    def _round(self, layers: Sequence[LayerTask], m: Moments, judge: Moments) -> None:
        """Layers of one spec and one input, as one matrix."""
        spec, w = layers[0].spec, torch.cat([layer.w for layer in layers]).float()
        t = self._target(w, m, judge)
        firm = damped(m.h, self.damp)
        range_of = hal.search(t, spec, importance=m.h.diagonal().contiguous(), grid=self.grid)
        grid = Grid.of(t, range_of, spec)
        q, h = feedback(t, firm, grid), firm.float()
        for _ in range(self.rounds):
            q, grid = refit(q, t, h, grid)
            for _ in range(self.sweeps):
                q = descend(q, t, h, grid)
        p = grid.params()
        for rows, layer in zip(_rows(layers), layers, strict=True):
            layer.w = q[rows].contiguous()  # on the grid: rounding gives it back exactly
            layer.params = hal.Params(
                None, *(x[rows].contiguous() for x in (p.lo, p.hi, p.amin, p.amax))
            )

    def _target(self, w: Tensor, m: Moments, judge: Moments) -> Tensor:
        """The weight that makes up for what is missing, as far as held-out samples agree."""
        least, best = 0.0, w
        lacking = judge.miss if judge.of_output else w @ judge.miss
        for ridge in self.ridges:
            back = torch.linalg.solve(damped(m.h, ridge), m.miss.double().t()).t().float()
            change = back if m.of_output else w @ back
            # ||miss - change X||^2 over the judging samples, less what does not depend on change.
            cost = float(((change @ judge.h - 2 * lacking) * change).sum())
            if cost < least:
                least, best = cost, w + change
        return best


def _rows(layers: Sequence[LayerTask]) -> list[slice]:
    """Where each layer lies in the matrix of them all."""
    ends = list(accumulate(len(layer.w) for layer in layers))
    return [slice(end - len(layer.w), end) for end, layer in zip(ends, layers, strict=True)]


def _by_spec(layers: Mapping[str, LayerTask], names: Sequence[str]) -> list[list[str]]:
    groups: dict[hal.Spec, list[str]] = {}
    for name in names:
        groups.setdefault(layers[name].spec, []).append(name)
    return list(groups.values())
