# SPDX-License-Identifier: Apache-2.0
"""Rounding in closed form: each layer in turn made to undo the errors of all before it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

import hal
from autoround.stages.inputs import Moments, dataflow, expert_moments, gain, moments
from autoround.stages.quadratic import Grid, damped, descend, feedback, refit, solved
from autoround.stages.task import BlockTask, LayerTask

#: Bytes of the moments of experts that are gathered in one pass over the samples.
AT_ONCE = 1 << 30
#: Rows of a weight, at least, on which a ridge is judged.
JUDGED = 256


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

    Fused experts come last, each with the moments of the tokens sent to it. So that few tokens mean
    no guess, ``prior`` K tokens like the mean of all experts' are added: an expert without any is
    rounded for all experts' inputs. Layers that no sample reaches keep the parameters they have.
    The weight of every other layer becomes one that rounds to the codes found.
    """

    batch_size: int
    grid: int = 100
    ridges: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    damp: float = 0.1
    rounds: int = 5
    sweeps: int = 2
    prior: float = 0.25

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
            del found, judge  # the next ones are as large

        for name in task.layers:
            if name not in task.own and name not in done:
                self._experts(task, name, batches, judging)

    def _round(self, layers: Sequence[LayerTask], m: Moments, judge: Moments) -> None:
        """Layers of one spec and one input, as one matrix."""
        spec, w = layers[0].spec, torch.cat([layer.w for layer in layers]).float()
        q, p = self._rounded(self._target(w, m, judge), m.h, spec)
        for rows, layer in zip(_rows(layers), layers, strict=True):
            layer.w = q[rows].contiguous()  # on the grid: rounding gives it back exactly
            layer.params = hal.Params(
                None, *(x[rows].contiguous() for x in (p.lo, p.hi, p.amin, p.amax))
            )

    def _experts(
        self,
        task: BlockTask,
        name: str,
        batches: Sequence[Sequence[int]],
        judging: Sequence[Sequence[int]],
    ) -> None:
        """A fused weight, expert by expert; left alone where its inputs cannot be told apart."""
        layer, done = task.layers[name], task.fixed
        count, k = task.module.get_parameter(name).shape[0], layer.w.shape[1]
        t = layer.w.float()
        dense = moments(task, name, done, batches, None)
        if dense is not None and dense.h.shape == (k, k):  # the module's own input goes into it
            judge = moments(task, name, done, judging, None) if judging else dense
            t = self._target(t, dense, judge or dense)
        q, ranges, step = torch.empty_like(t), list[hal.Params](), max(1, AT_ONCE // (4 * k * k))
        reached: list[int] = []
        for start in range(0, count, step):
            experts = range(start, min(start + step, count))
            found = expert_moments(task, name, done, batches, experts)
            if found is None:
                return
            mean = found.together / max(1, found.routed)
            reached += found.tokens.tolist()
            for at, expert in enumerate(experts):
                rows = slice(expert * len(t) // count, (expert + 1) * len(t) // count)
                h = found.h[at] + self.prior * k * mean
                q[rows], p = self._rounded(t[rows], h, layer.spec)
                ranges.append(p)
        layer.w = q
        layer.params = hal.Params(
            None,
            *(
                torch.cat([getattr(p, part) for p in ranges])
                for part in ("lo", "hi", "amin", "amax")
            ),
        )
        done[name] = hal.qdq(layer.w, layer.ready, layer.spec).to(layer.dtype)
        task.tokens[name] = reached
        sparse = sum(tokens < k for tokens in reached)
        task.report["sparse_experts"] = task.report.get("sparse_experts", 0) + sparse

    def _rounded(self, t: Tensor, h: Tensor, spec: hal.Spec) -> tuple[Tensor, hal.Params]:
        """The matrix of levels nearest to ``t`` in the sense of ``h``, and their grid."""
        range_of = hal.search(t, spec, importance=h.diagonal().contiguous(), grid=self.grid)
        grid, t = Grid.of(t, range_of, spec), t.t().contiguous()
        h = damped(h, self.damp, h.dtype)
        q, want = feedback(t, h, grid), h @ t
        for _ in range(self.rounds):
            q, grid = refit(q, want, h, grid)
            q = descend(q, t, h, grid, self.sweeps)
        return q.t().contiguous(), grid.params()

    def _target(self, w: Tensor, m: Moments, judge: Moments) -> Tensor:
        """The weight that makes up for what is missing, as far as held-out samples agree."""
        few = slice(None, None, max(1, len(w) // JUDGED))
        lacks, judged = (x.miss[few] if x.of_output else w[few] @ x.miss for x in (m, judge))

        def cost(ridge: float) -> float:
            """||miss - change X||^2 over the judging samples, less what no change alters."""
            change = solved(m.h, ridge, lacks)
            if change is None:
                return math.inf
            return float(((change @ judge.h - 2 * judged) * change).sum())

        lowest, ridge = least(cost, self.ridges) if self.ridges else (0.0, 0.0)
        if lowest >= 0:
            return w
        change = solved(m.h, ridge, m.miss)
        assert change is not None
        return w + (change if m.of_output else w @ change)


def least(of: Callable[[float], float], values: Sequence[float]) -> tuple[float, float]:
    """The least of a function that falls, then rises, and where: from the middle downhill."""
    at = len(values) // 2
    best = of(values[at])
    for step in (-1, 1):
        moved = False
        while 0 <= at + step < len(values) and (found := of(values[at + step])) < best:
            best, at, moved = found, at + step, True
        if moved:
            break
    return best, values[at]


def _rows(layers: Sequence[LayerTask]) -> list[slice]:
    """Where each layer lies in the matrix of them all."""
    ends = list(accumulate(len(layer.w) for layer in layers))
    return [slice(end - len(layer.w), end) for end, layer in zip(ends, layers, strict=True)]


def _by_spec(layers: Mapping[str, LayerTask], names: Sequence[str]) -> list[list[str]]:
    groups: dict[hal.Spec, list[str]] = {}
    for name in names:
        groups.setdefault(layers[name].spec, []).append(name)
    return list(groups.values())
