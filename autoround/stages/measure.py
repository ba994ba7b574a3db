# SPDX-License-Identifier: Apache-2.0
"""How far a block is from its float self, at some point of the way."""

import torch

import hal
from autoround.stages.task import BlockTask


class Measure:
    """Mean squared error of the block as it stands, over all samples, into the report."""

    def __init__(self, key: str, batch_size: int) -> None:
        self.key, self.batch_size = key, batch_size

    def run(self, task: BlockTask) -> None:
        assert task.x is not None
        weights = {n: hal.qdq(t.w, t.ready, t.spec) for n, t in task.layers.items()}
        indices, total = task.x.indices, 0.0
        with torch.no_grad():
            for batch in task.x.batches(indices, self.batch_size):
                total += float(task.loss(batch, weights)) * len(batch)
        task.report[self.key] = total / len(indices)
