# SPDX-License-Identifier: Apache-2.0
"""How far a block is from its float self, at some point of the way."""

from dataclasses import dataclass

import torch

import hal
from autoround.stages.task import BlockTask, Stage, hidden, relative_error


@dataclass(frozen=True, slots=True)
class Measure:
    """Error of the block as it stands, into the report."""

    key: str
    batch_size: int

    def run(self, task: BlockTask) -> None:
        task.report[self.key] = block_loss(task, self.batch_size)


@dataclass(frozen=True, slots=True)
class Kept:
    """A stage whose result is kept only where the measured loss falls below ``report[than]``."""

    stage: Stage
    than: str
    batch_size: int

    def run(self, task: BlockTask) -> None:
        before = {name: (layer.w, layer.params) for name, layer in task.layers.items()}
        fixed = dict(task.fixed)
        self.stage.run(task)
        if not block_loss(task, self.batch_size) < task.report[self.than]:
            for name, layer in task.layers.items():
                layer.w, layer.params = before[name]
            task.fixed = fixed


def block_loss(task: BlockTask, batch_size: int) -> float:
    """`relative_error` of the rounded block over the samples that judge."""
    assert task.x is not None
    weights = {n: hal.qdq(t.w, t.ready, t.spec) for n, t in task.layers.items()}
    total = 0.0
    with torch.no_grad():
        for batch in task.x.batches(task.judged, batch_size):
            out = hidden(task.forward(task.x.gather(batch), weights))
            total += float(relative_error(out, task.target(batch))) * len(batch)
    return total / len(task.judged)
