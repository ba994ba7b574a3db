# SPDX-License-Identifier: Apache-2.0
"""The starting point: a range for every group."""

import hal
from autoround.stages.task import BlockTask


class Search:
    """Initial range of every weight of a block: min-max. Alone, it is rounding to nearest."""

    def run(self, task: BlockTask) -> None:
        for layer in task.layers.values():
            layer.params = hal.search(layer.w, layer.spec)
