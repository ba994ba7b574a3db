# SPDX-License-Identifier: Apache-2.0
"""What the pipeline sees of a model: checkpoint, streamed skeleton, blocks, weights."""

from autoround.models.blocks import BlockList, find_blocks
from autoround.models.checkpoint import Checkpoint, resolve
from autoround.models.drive import PausedForwards
from autoround.models.header import Entry
from autoround.models.loader import StreamedModel
from autoround.models.samples import Call, Samples, split
from autoround.models.views import Part, WeightView, head_view, skipped, verify, views

__all__ = [
    "BlockList",
    "Call",
    "Checkpoint",
    "Entry",
    "Part",
    "PausedForwards",
    "Samples",
    "StreamedModel",
    "WeightView",
    "find_blocks",
    "head_view",
    "resolve",
    "skipped",
    "split",
    "verify",
    "views",
]
