# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization by signed gradient descent on the rounding.

Importing this costs milliseconds; what it offers is imported on first use. It also lets
``transformers`` load quantized directories on `hal.qgemm` (see `autoround.integrations.hook`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoround.integrations import hook
from autoround.version import VERSION as __version__

if TYPE_CHECKING:
    from autoround.api import AutoRound
    from autoround.errors import InputError
    from autoround.formats import FORMATS
    from autoround.inference.loading import load
    from autoround.recipe import RECIPES, Recipe
    from autoround.run.pipeline import quantize
    from autoround.run.record import Source
    from autoround.scheme import SCHEMES, Scheme

_HOMES = {
    "AutoRound": "api",
    "FORMATS": "formats",
    "InputError": "errors",
    "RECIPES": "recipe",
    "Recipe": "recipe",
    "SCHEMES": "scheme",
    "Scheme": "scheme",
    "Source": "run.record",
    "load": "inference.loading",
    "quantize": "run.pipeline",
}
__all__ = [
    "FORMATS",
    "RECIPES",
    "SCHEMES",
    "AutoRound",
    "InputError",
    "Recipe",
    "Scheme",
    "Source",
    "__version__",
    "load",
    "quantize",
]

hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoround' has no attribute {name!r}")
    return getattr(import_module(f"autoround.{_HOMES[name]}"), name)
