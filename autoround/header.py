# SPDX-License-Identifier: Apache-2.0
"""The header of one safetensors file, checked to the byte before anything is read through it."""

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.files import AGAIN

MAX_HEADER = 100_000_000  # the limit of the format's own reader
DIMENSIONS = 64  # torch has no more
LONGEST = 1000  # characters of a tensor's name
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: shard, safetensors dtype ("BF16"), shape, bytes, first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one file in file order. The file's size must agree to the byte.

    InputError for a file that is missing, empty, truncated, not safetensors, or whose tensors
    overlap or leave holes."""
    size, head = _read(path)
    table = _table(path, head)
    rows = [(*_offsets(path, name, raw), name) for name, raw in table.items()]
    at = 0
    for begin, end, name in sorted(rows):
        if begin != at:
            raise InputError(
                f"{path}: {name} begins at byte {begin}, not {at}: overlap or hole; {AGAIN}"
            )
        at = end
    if at != (held := size - 8 - len(head)):
        raise InputError(f"{path} holds {held} bytes of {at}: truncated or overlong; {AGAIN}")
    return {
        name: Entry(
            path, table[name]["dtype"], tuple(table[name]["shape"]), end - begin,
            8 + len(head) + begin,
        )
        for begin, end, name in sorted(rows)
    }  # fmt: skip


def _table(path: Path, head: bytes) -> dict[str, Any]:
    """Name -> row, without the metadata."""
    try:
        table = json.loads(head.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: the header is not JSON ({reason}): corrupt; {AGAIN}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: the header is a JSON {type(table).__name__}: corrupt; {AGAIN}")
    said = table.pop("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
        raise InputError(f"{path}: the header's __metadata__ is not of words: corrupt; {AGAIN}")
    odd = (name for name in table if not name.isprintable() or not 0 < len(name) <= LONGEST)
    if (name := next(odd, None)) is not None:
        raise InputError(f"{path}: {name!r:.60} is no name of a tensor: corrupt; {AGAIN}")
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are each there once; what a second one would mean, readers disagree."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r:.60} is there twice")
    return found


def _read(path: Path) -> tuple[int, bytes]:
    """File size and the header's bytes."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no ordinary file; {AGAIN}")
        size = found.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if 2 <= length <= min(MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
    if not head:
        raise InputError(f"{path} has {size} bytes and no header: truncated or corrupt; {AGAIN}")
    return size, head


def _offsets(path: Path, name: str, raw: Any) -> tuple[int, int]:
    """First and last byte (half open) of one tensor, which must fit its shape and dtype."""
    try:
        begin, end = raw["data_offsets"]
        shape, bits = raw["shape"], BITS[raw["dtype"]]
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        whole &= len(shape) <= DIMENSIONS
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or (end - begin) * 8 != math.prod(shape) * bits:
        raise InputError(f"{path}: the header row of {name} is wrong ({str(raw)[:80]}); {AGAIN}")
    return begin, end
