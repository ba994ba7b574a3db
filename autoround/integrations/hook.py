# SPDX-License-Identifier: Apache-2.0
"""Registers our loader with transformers when, and only when, something imports transformers.

`import autoround` costs milliseconds this way. ``AUTOROUND_TRANSFORMERS_HOOK=0`` turns it off.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"
#: Methods of other programs that our quantizer reads.
FOREIGN = ("gptq", "awq", "compressed-tensors")


def install() -> None:
    """Register now if transformers is loaded already, else as soon as it is."""
    if os.environ.get("AUTOROUND_TRANSFORMERS_HOOK") == "0":
        return
    if TARGET in sys.modules:
        _register(sys.modules[TARGET])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: ModuleType) -> None:
    # Replaces the entry: register_quantizer refuses names that are taken.
    module.AUTO_QUANTIZER_MAPPING["auto-round"] = _quantizer
    config = module.AutoRoundConfig
    if not hasattr(config.from_dict, "reads_foreign"):
        config.from_dict = classmethod(_from_any(config.from_dict.__func__))


def _from_any(original: Callable[..., Any]) -> Callable[..., Any]:
    """`AutoRoundConfig.from_dict` for what `from_pretrained(..., AutoRoundConfig())` finds.

    transformers takes GPTQ and AWQ configs only, and of GPTQ none that GPTQModel wrote (``meta``).
    Our quantizer reads the files themselves, so of a foreign config only the method matters.
    """

    def from_dict(cls: Any, config_dict: dict[str, Any], *given: Any, **options: Any) -> Any:
        if config_dict.get("quant_method") in FOREIGN:
            config_dict = {"quant_method": "auto-round"}
        return original(cls, config_dict, *given, **options)

    from_dict.reads_foreign = True  # type: ignore[attr-defined]
    return from_dict


def _quantizer(config: Any, **options: Any) -> Any:
    """Makes our quantizer; imported at the first load, when transformers is complete."""
    from autoround.integrations.transformers import AutoroundQuantizer

    return AutoroundQuantizer(config, **options)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module the usual way and has it registered with after it ran."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register(module)
