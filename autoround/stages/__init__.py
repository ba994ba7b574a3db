# SPDX-License-Identifier: Apache-2.0
"""What is done to one block, one small object per step."""

from autoround.stages.measure import Measure
from autoround.stages.search import Search
from autoround.stages.signround import SignRound
from autoround.stages.task import BlockTask, LayerTask, Stage

__all__ = ["BlockTask", "LayerTask", "Measure", "Search", "SignRound", "Stage"]
