# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a module, by the rules of its readers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoround.patterns import compiled


@dataclass(frozen=True, slots=True)
class Claim:
    """A module is quantized: bits, group (-1 = whole row), and symmetric if that is said."""

    bits: int
    group_size: int
    sym: bool | None = None


Config = Mapping[str, Any]


def auto_round(config: Config, name: str, inside: bool) -> Claim | None:
    """Exact names win over regular expressions, those over the defaults within the blocks."""
    extra = config.get("extra_config") or {}
    own = extra.get(name)
    if own is None:
        own = next((row for key, row in extra.items() if _is_regex(key, name)), None)
    blocks = str(config.get("block_name_to_quantize") or "").split(",")
    covered = any(name.startswith(block.strip() + ".") for block in blocks)
    if own is None and not covered:
        return None
    return _claim({**_plain(config), **(own or {})})


def gptq(config: Config, name: str, inside: bool) -> Claim | None:
    """GPTQModel's ``dynamic`` in its order, then the list of names inside a block."""
    for key, own in (config.get("dynamic") or {}).items():
        if compiled(key.removeprefix("-:").removeprefix("+:")).match(name):
            return None if key.startswith("-:") else _claim({**_plain(config), **own})
    if not inside:
        return _claim(_plain(config)) if config.get("lm_head") else None
    listed = config.get("modules_in_block_to_quantize")
    if listed and not any(name.endswith("." + suffix) for row in listed for suffix in row):
        return None
    return _claim(_plain(config))


def awq(config: Config, name: str, inside: bool) -> Claim | None:
    """Names are looked for anywhere in a module's name."""
    if any(skip in name for skip in config.get("modules_to_not_convert") or ()):
        return None
    # Readers that are told of no zero points take the middle.
    symmetric = None if config.get("zero_point", True) else True
    return Claim(int(config["bits"]), int(config["group_size"]), symmetric)


def compressed(config: Config, name: str, inside: bool) -> Claim | None:
    """``ignore`` first; then names, then regular expressions, then the class of linear layers."""
    if any(_named(row, name) for row in config.get("ignore") or ()):
        return None
    groups = list((config.get("config_groups") or {}).values())
    exact = [g for g in groups if any(_named(row, name) for row in g["targets"])]
    for group in exact or [g for g in groups if "Linear" in g["targets"]]:
        own = group["weights"]
        return Claim(own["num_bits"], own.get("group_size") or -1, own["symmetric"])
    return None


def mlx(config: Config, name: str, inside: bool) -> Claim | None:
    """A row of its own, or the defaults (whether it is quantized at all, its tensors tell)."""
    own = config.get(name)
    if own is False:
        return None
    row = own if isinstance(own, dict) else config
    return Claim(int(row["bits"]), int(row["group_size"]))


def _plain(config: Config) -> dict[str, Any]:
    return {key: config.get(key) for key in ("bits", "group_size", "sym")}


def _claim(row: Config) -> Claim | None:
    if int(row["bits"]) >= 16:
        return None
    return Claim(int(row["bits"]), int(row["group_size"]), row.get("sym"))


def _is_regex(key: str, name: str) -> bool:
    return bool(re.search(r"[*+?^$()\[\]{}|\\]", key)) and compiled(key).search(name)


def _named(row: str, name: str) -> bool:
    return compiled(row[3:]).match(name) if row.startswith("re:") else row == name


RULES: dict[str, Callable[[Config, str, bool], Claim | None]] = {
    "auto-round": auto_round,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "mlx": mlx,
}
