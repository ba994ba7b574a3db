# SPDX-License-Identifier: Apache-2.0
"""What the pipeline sees of a model: checkpoint, survey, streamed skeleton, blocks.

Imported on first use: a checkpoint is read without transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoround.models.blocks import BlockList, find_blocks
    from autoround.models.compat import tokenizer_of
    from autoround.models.drive import PausedForwards
    from autoround.models.loader import StreamedModel
    from autoround.models.samples import Call, Samples, moved, split
    from autoround.models.store import Pool, Store, keep_freed, trim
    from autoround.models.survey import Part, Survey, WeightView
    from autoround.models.views import head_view, skipped, survey_of, verify, views_of

_HOMES = {
    "BlockList": "blocks",
    "Call": "samples",
    "Part": "survey",
    "PausedForwards": "drive",
    "Pool": "store",
    "Samples": "samples",
    "Store": "store",
    "StreamedModel": "loader",
    "Survey": "survey",
    "WeightView": "survey",
    "find_blocks": "blocks",
    "head_view": "views",
    "skipped": "views",
    "moved": "samples",
    "split": "samples",
    "survey_of": "views",
    "tokenizer_of": "compat",
    "keep_freed": "store",
    "trim": "store",
    "verify": "views",
    "views_of": "views",
}
__all__ = [
    "BlockList",
    "Call",
    "Part",
    "PausedForwards",
    "Pool",
    "Samples",
    "Store",
    "StreamedModel",
    "Survey",
    "WeightView",
    "find_blocks",
    "head_view",
    "keep_freed",
    "moved",
    "skipped",
    "split",
    "survey_of",
    "tokenizer_of",
    "trim",
    "verify",
    "views_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoround.models' has no attribute {name!r}")
    return getattr(import_module(f"autoround.models.{_HOMES[name]}"), name)
