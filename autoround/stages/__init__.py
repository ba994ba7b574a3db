# SPDX-License-Identifier: Apache-2.0
"""What is done to one block, one small object per step."""

from autoround.stages.end_to_end import EndToEnd, ModelTask, Scaled, Vector, stride
from autoround.stages.feedback import Feedback
from autoround.stages.measure import Kept, Measure
from autoround.stages.search import Search, WeightedSearch
from autoround.stages.signround import SignRound
from autoround.stages.steps import Signed, Steps, adam, momentum
from autoround.stages.task import BlockTask, LayerTask, Stage

__all__ = [
    "BlockTask",
    "EndToEnd",
    "Feedback",
    "Kept",
    "LayerTask",
    "Measure",
    "ModelTask",
    "Scaled",
    "Search",
    "SignRound",
    "Signed",
    "Stage",
    "Steps",
    "Vector",
    "WeightedSearch",
    "adam",
    "momentum",
    "stride",
]
