# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of its quantization, with only such values as some writer means."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autoround.errors import InputError
from autoround.patterns import MOST

#: A key or row that is a name; others are patterns.
NAME = re.compile(r"[\w.-]+")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, str) for row in value) and _few(value)


def _tables(value: Any) -> bool:
    rows = isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())
    return rows and _few(value)


def _few(rows: Iterable[str]) -> bool:
    return sum(not NAME.fullmatch(row) for row in rows) <= MOST


def _whole(value: Any) -> bool:
    return type(value) is int and -1 <= value < 1 << 31


def _groups(value: Any) -> bool:
    return _tables(value) and all(
        _texts(row.get("targets")) and isinstance(row.get("weights"), dict)
        for row in value.values()
    )


def _suffixes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_texts, value))


#: What a quantizer's settings may be, where they are there at all and not null.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "quant_method": lambda value: isinstance(value, str),
    "bits": _whole,
    "group_size": _whole,
    "extra_config": _tables,
    "dynamic": _tables,
    "modules_to_not_convert": _texts,
    "ignore": _texts,
    "config_groups": _groups,
    "modules_in_block_to_quantize": _suffixes,
    "version": lambda value: isinstance(value, str),
}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of its quantization. Raises InputError for what no writer means."""
    found: dict[str, Any] = {}
    for part in ("quantization", "quantization_config"):  # MLX writes both
        own = config.get(part) or {}
        if not isinstance(own, dict):
            raise InputError(f"{part} is {own!r:.60}, which says nothing")
        rows = [*_rows(own, "extra_config"), *_rows(own, "dynamic")]
        for row in (own, *rows):
            for key, good in SETTINGS.items():
                if row.get(key) is not None and not good(row[key]):
                    raise InputError(f"{key} in {part} is {row[key]!r:.60}, which says nothing")
        found = own or found
    return found


def _rows(own: Mapping[str, Any], key: str) -> Iterable[Any]:
    """Settings of single modules."""
    found = own.get(key) or {}
    return found.values() if _tables(found) else ()
