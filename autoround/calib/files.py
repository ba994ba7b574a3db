# SPDX-License-Identifier: Apache-2.0
"""Rows of local files: ``.jsonl``, ``.json``, ``.txt`` and ``.parquet``."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from autoround.calib.rows import ROW_KEYS
from autoround.errors import InputError
from autoround.files import parse_json

#: Bytes of the largest file that is read: its rows are held in memory.
MOST = 4_000_000_000


def is_file_name(name: str) -> bool:
    """Whether a dataset name means a local file: it exists, or it ends like one."""
    path = Path(name)
    if any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        return False  # a text, not the name of a file
    return path.suffix.lower() in _READERS or path.exists()


def check_file(path: Path) -> None:
    """Raise InputError when there is no such file or its kind is unknown; reads nothing."""
    if not path.exists():
        raise InputError(f"dataset file {str(path)!r} does not exist: check the path")
    if path.suffix.lower() not in _READERS or not path.is_file():
        kinds = ", ".join(_READERS)
        raise InputError(f"dataset {str(path)!r} cannot be read: give one file ending in {kinds}")
    if path.stat().st_size > MOST:
        raise InputError(
            f"dataset {str(path)!r} has {path.stat().st_size / 1e9:.3g} GB: calibration wants some "
            f"megabytes; give a part of it, of less than {MOST / 1e9:.3g} GB"
        )


def read_file(path: Path) -> Sequence[Any]:
    """The rows of one file; raises InputError when it is missing, broken or of an unknown kind."""
    check_file(path)
    try:
        return _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"dataset file {str(path)!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"dataset file {str(path)!r} is not UTF-8 text: convert it first"
        ) from error


class _Rows(Sequence[Any]):
    """Rows made one by one, only when asked for; slices are lists of them."""

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        return self.row(range(len(self))[index])

    @abstractmethod
    def row(self, index: int) -> Any:
        """Row ``index``, 0 <= index < len."""


class _JsonLines(_Rows):
    """Lines of a ``.jsonl`` file, each parsed only when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text("utf-8-sig")
        # Not splitlines(): a JSON string may hold U+2028, which that would take for a line end.
        numbered = enumerate(text.split("\n"), start=1)
        self._lines = [(number, line) for number, line in numbered if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> Any:
        number, line = self._lines[index]
        where = f"dataset file {str(self._path)!r}, line {number},"
        return parse_json(line, where, "every line must be one JSON value")


class _Table(_Rows):
    """Rows of an Arrow table as dicts, converted one by one."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def _json(path: Path) -> Sequence[Any]:
    hint = "rename it to .jsonl if it holds one value a line"
    content = parse_json(path.read_text("utf-8-sig"), f"dataset file {str(path)!r}", hint)
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise InputError(f"dataset file {str(path)!r} holds one bare value: give a list of texts")
    if not ROW_KEYS.isdisjoint(content):
        return [content]
    found: list[Any] = []
    for value in content.values():
        # {"data": [row, row]} and {"id1": row, "id2": row} are both common; a list of ids is a row.
        is_rows = isinstance(value, list) and not all(isinstance(v, int) for v in value)
        found.extend(value if is_rows else [value])
    return found


def _text(path: Path) -> Sequence[Any]:
    return [path.read_text("utf-8-sig")]


def _parquet(path: Path) -> Sequence[Any]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            f"dataset file {str(path)!r} needs the 'pyarrow' package: pip install pyarrow, "
            "or convert the file to .jsonl"
        ) from error
    try:
        names = set(parquet.read_schema(path).names)
        wanted = sorted(names & ROW_KEYS)
        return _Table(parquet.read_table(path, columns=wanted or None))
    except (arrow.ArrowException, ArithmeticError, LookupError, MemoryError, TypeError) as error:
        raise InputError(f"dataset file {str(path)!r} is not readable Parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Sequence[Any]]] = {
    ".jsonl": _JsonLines,
    ".json": _json,
    ".txt": _text,
    ".parquet": _parquet,
}
