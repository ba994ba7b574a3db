# SPDX-License-Identifier: Apache-2.0
"""How far a block is from its float self, at some point of the way."""

import torch

import hal
from autoround.stages.task import BlockTask, chunks

BATCH = 8


class Measure:
    """Mean squared error of the block as it stands, over all samples, into the report."""

    def __init__(self, key: str) -> None:
        self.key = key

    def run(self, task: BlockTask) -> None:
        assert task.x is not None
        weights = {n: hal.qdq(t.w, t.ready, t.spec) for n, t in task.layers.items()}
        indices, total = task.x.indices, 0.0
        with torch.no_grad():
            for part in chunks(indices, BATCH):
                for batch in task.x.batches(part, BATCH):
                    total += float(task.loss(batch, weights)) * len(batch)
        task.report[self.key] = total / len(indices)
