# SPDX-License-Identifier: Apache-2.0
"""From what users write on a command line or in a constructor to a Recipe."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoround.errors import InputError
from autoround.files import read_json
from autoround.recipe import Recipe, recipe_by_name
from autoround.scheme import Scheme
from hal import device as devices

#: Choices that only steps use. Giving one without naming a recipe asks for SignRound.
STEPS_ONLY = (
    "lr",
    "minmax_lr",
    "gradient_accumulate_steps",
    "enable_minmax_tuning",
    "not_use_best_mse",
    "dynamic_max_gap",
    "momentum",
    "enable_adam",
    "nblocks",
)
#: Values of theirs that ask for nothing: the known tool's defaults.
NEUTRAL = {"gradient_accumulate_steps": 1, "dynamic_max_gap": -1, "momentum": 0.0, "nblocks": 1}
#: Choices that only a run with data uses.
DATA_ONLY = ("dataset", "nsamples", "seqlen", "batch_size", "enable_quanted_input", "seed")


def build_recipe(name: str | None, changes: Mapping[str, Any]) -> Recipe:
    """A named recipe with changes (None = not given).

    Without a name: ``rtn`` for ``iters`` 0, ``signround`` where steps or their rates are given,
    else ``autoround``. A choice that would have no effect raises InputError.
    """
    changes = {k: v for k, v in changes.items() if k not in NEUTRAL or v != NEUTRAL[k]}
    if name is None:
        stepwise = any(changes.get(key) is not None for key in ("iters", *STEPS_ONLY))
        name = "rtn" if changes.get("iters") == 0 else "signround" if stepwise else "autoround"
    recipe = recipe_by_name(name, changes)
    idle: tuple[str, ...] = () if recipe.iters else STEPS_ONLY
    idle += () if recipe.calibrates else DATA_ONLY
    unused = [key for key in idle if changes.get(key) is not None]
    if unused:
        raise InputError(
            f"{unused[0]} has no effect without tuning (iters=0); leave it out, or give --iters"
        )
    return recipe


def parse_layer_config(text: str) -> dict[str, Any]:
    """JSON, the path of a JSON file, or the loose form ``{k_proj:{bits:8}}``."""
    if text.endswith(".json"):
        if not Path(text).exists():
            raise InputError(f"layer_config file {text} does not exist")
        remedy = 'write e.g. {"lm_head": {"bits": 8}}'
        return read_json(Path(text), remedy)
    for candidate in (text, _quoted(text)):
        try:
            parsed = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            return parsed
    raise InputError(
        f'layer_config {text[:60]!r} is not JSON; write e.g. \'{{"lm_head": {{"bits": 8}}}}\''
    )


def _quoted(text: str) -> str:
    """Quote the bare words of the loose form."""
    words = r"(?<![\w\"])([A-Za-z_.^][\w.*$^]*)(?![\w\"])"
    keep = {"true", "false", "null"}
    lowered = re.sub(
        r"\b(True|False|None)\b", lambda m: {"None": "null"}.get(m[0], m[0].lower()), text
    )
    return re.sub(words, lambda m: m[0] if m[0] in keep else json.dumps(m[0]), lowered)


def split_names(text: str | None) -> tuple[str, ...] | None:
    """``a, b`` -> ("a", "b"); None stays None."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


DeviceMap = str | int | Mapping[str, str | int] | None


def device_by_name(device_map: DeviceMap) -> torch.device:
    """The device that tunes: the first that is named, None = the machine's first.

    One is enough: a block is tuned at a time, so the largest block has to fit it, not the model.
    Raises InputError naming what exists here.
    """
    return devices_by_name(device_map)[0]


def devices_by_name(device_map: DeviceMap) -> list[torch.device]:
    """The different devices of any known form of ``device_map``, in the order named.

    ``auto``, ``cuda:0``, ``0``, a list (``0,1``), or a map of layers to devices
    (``{"model.layers.0": 0}``, ``model.layers.0:0,model.layers.1:1``).
    """
    named = list(layers_by_device(device_map).values()) if _maps(device_map) else _list(device_map)
    return list(dict.fromkeys(_device(name) for name in named or [None]))


def layers_by_device(device_map: DeviceMap) -> dict[str, str | int]:
    """Layer -> device of a ``device_map`` that has them, else nothing."""
    if isinstance(device_map, Mapping):
        return dict(device_map)
    found = [_LAYER.fullmatch(piece) for piece in _list(device_map)]
    return {m[1]: m[2] for m in found if m}


# `layer:device`, unlike `cuda:0`, has a dot or nothing that names a device before the colon
_LAYER = re.compile(r"([\w*]*\.[^:]*):(.+)")


def _maps(device_map: DeviceMap) -> bool:
    return isinstance(device_map, Mapping) or bool(layers_by_device(device_map))


def _list(device_map: DeviceMap) -> list[str]:
    return [] if device_map is None else [p.strip() for p in str(device_map).split(",")]


def _device(name: str | int | None) -> torch.device:
    try:
        return devices.resolve(name)
    except ValueError as error:
        raise InputError(str(error)) from None


def default_output(model: str, scheme: Scheme) -> Path:
    """``<model name>-w4g128`` in the current directory."""
    group = f"g{scheme.group_size}" if scheme.group_size > 0 else "row"
    return Path(f"{Path(model).name}-w{scheme.bits}{group}")
