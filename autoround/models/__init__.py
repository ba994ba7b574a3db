# SPDX-License-Identifier: Apache-2.0
"""Models as the pipeline sees them: a checkpoint, a streamed skeleton, its blocks, their weights."""

from autoround.models.blocks import BlockList, find_blocks
from autoround.models.checkpoint import Checkpoint, Entry, resolve
from autoround.models.drive import PausedForwards
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
