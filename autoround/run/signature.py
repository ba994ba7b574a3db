# SPDX-License-Identifier: Apache-2.0
"""Everything that can change a bit of a run's result: what a run can be continued by."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from autoround.calib import TokenSet
from autoround.recipe import Recipe
from autoround.version import VERSION
from hal import device as devices

#: A signature is these rows of a run's record.
Signature = dict[str, Any]


def signature(
    recipe: Recipe,
    content: Mapping[str, str],
    tokens: TokenSet | None,
    device: torch.device | None,
    trusted: bool,
) -> Signature:
    """Versions, choices, calibration tokens, the source's content, and what computes.

    ``content``: file of the source -> its digest. ``device``: None where nothing is computed whose
    last bit depends on it: rounding to nearest is the same everywhere, products are not. The number
    of threads is not among it (`tests/autoround/test_resume.py`).
    """
    return {
        "autoround": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "recipe": recipe.to_json(),
        "calibration": tokens and {"digest": tokens.digest, "shape": [*tokens.ids.shape]},
        "computed": _computed(device) if device is not None and tokens else None,
        "trust_remote_code": trusted,
        "source": dict(content),
    }


def _computed(device: torch.device) -> dict[str, str]:
    """The instruction set or chip, for our kernels and for torch's."""
    return {
        "on": f"{device.type} {devices.caps(device).arch}",
        "host": torch.backends.cpu.get_cpu_capability(),
    }
