# SPDX-License-Identifier: Apache-2.0
"""What a run has committed: one row a block in ``OUTPUT/journal``, each whole or not there at all.

    run.json      the signature: everything that can change a bit of the result
    00000.json    rows, in order; each ends with the sha256 of the one before it and itself
    *.chains      what passes between blocks after the last row (`autoround.run.chains`)
    lock          held while a run writes to the directory

A row is written last, after all that it speaks of is on the disk: temporary file, fsync, rename,
fsync of the directory. `Journal.close` removes run.json first: from then on the run is finished.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.files import read_bytes

HOME = "journal"
RUN = "run.json"
LOCK = "lock"
AGAIN = "check the disk, then start over with --fresh"
EVERY = 10.0  # seconds between rows where a block takes less


class Journal:
    """The rows of one run; made by `autoround.run.directory.claim`, which holds the lock meanwhile.

    ``rows``: what is committed, oldest first, once `begin` has been called. ``record``: what a
    finished run left in the directory; None where there is none, or ``fresh`` asks for another.
    ``begun``: `begin` has succeeded; all that is in the directory is this run's.
    """

    def __init__(
        self, output: Path, *, record: Mapping[str, Any] | None = None, fresh: bool = False
    ) -> None:
        self.output, self.record, self.fresh = output, record, fresh
        self.directory = output / HOME
        self.rows: list[dict[str, Any]] = []
        self.begun, self._total = False, 0
        self._last, self._committed = "", time.monotonic()

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Blocks that are committed, as rows tell of them."""
        return [report for row in self.rows for report in row["blocks"]]

    @property
    def kept(self) -> str:
        """Where a run that stops now stands."""
        return (
            f"{len(self.reports)} of {self._total} blocks are kept in {self.output}: the same "
            "command goes on from there"
        )

    def due(self) -> bool:
        """Whether enough was done since the last row to be worth another, of small things."""
        return time.monotonic() - self._committed > EVERY

    def begin(self, signature: Mapping[str, Any], blocks: int) -> None:
        """Take up the run of this signature that the directory holds, or begin it.

        Raises InputError where the directory holds another: with the first field that differs,
        both values and the remedy.
        """
        self._total = blocks
        if self.record is not None:
            self._compare(self.record, signature, "a finished run")
            return
        run = self.directory / RUN
        if run.is_file() and not self.fresh:
            text = read_bytes(run, AGAIN)
            rows = list(self._read(hashlib.sha256(text).hexdigest()))
            if rows:  # with nothing committed there is nothing to lose
                self._compare(self._parsed(run, text), signature, "a run begun")
                self.rows, self._last = [row for row, _ in rows], rows[-1][1]
                self.begun, self._committed = True, time.monotonic()
                return
        text = json.dumps(signature).encode()
        for path in self.directory.glob("[0-9]*.json"):
            remove(path)
        write_whole(run, text)  # before anything else goes: the directory is a run's at any instant
        self.begun, self._committed = True, time.monotonic()
        self._clear()
        self._last = hashlib.sha256(text).hexdigest()

    def commit(self, row: dict[str, Any]) -> None:
        """Add a row; everything it names must be on the disk."""
        text = json.dumps(row)
        self._last = _seal(self._last, text)
        write_whole(self.directory / _name(len(self.rows)), f"{text}\n{self._last}\n".encode())
        self.rows.append(row)
        self._committed = time.monotonic()
        for path in self.directory.glob("*.chains"):
            if path.name != (row.get("chains") or {}).get("file"):
                path.unlink()

    def close(self) -> None:
        """The run is finished and proven: the journal goes."""
        if self.record is not None:
            return
        (self.directory / RUN).unlink()
        settle(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)  # what stays says nothing without it
        settle(self.output)

    def _compare(self, then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
        for field, value in _leaves(now):
            held = then
            for step in field:
                held = held.get(step, "nothing") if isinstance(held, Mapping) else "nothing"
            if held != value:
                raise InputError(
                    f"{self.output} holds {what} with {'.'.join(field)} {_short(held)}, now it is "
                    f"{_short(value)}; give the same again, start over with --fresh, or choose "
                    "another -o"
                )
        for field, value in _leaves({key: then.get(key) for key in now}):
            if not _has(now, field):
                raise InputError(
                    f"{self.output} holds {what} with {'.'.join(field)} {_short(value)}, now there "
                    "is none; give the same again, start over with --fresh, or choose another -o"
                )

    def _read(self, last: str) -> Iterator[tuple[dict[str, Any], str]]:
        """Rows with their seals. Raises InputError at a damaged one, or one out of order."""
        present = sorted(self.directory.glob("[0-9]*.json"))
        for count, path in enumerate(present):
            held = read_bytes(path, AGAIN).decode(errors="replace")
            text, _, seal = held.rstrip("\n").rpartition("\n")
            last = _seal(last, text)
            if path.name != _name(count) or seal != last:
                raise self._damaged(path)
            yield self._parsed(path, text), last

    def _parsed(self, path: Path, text: str | bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._damaged(path)
        return found

    def _damaged(self, path: Path) -> InputError:
        return InputError(
            f"{path} is not as it was written, so {self.output} cannot be continued; {AGAIN}"
        )

    def _clear(self) -> None:
        """Leave nothing of an earlier run."""
        for path in [*self.directory.iterdir(), *self.output.iterdir()]:
            if path != self.directory and path.name not in (LOCK, RUN):
                remove(path)


def remove(path: Path) -> None:
    """Whatever is there: a file, a link, a pipe, or a directory with all that it holds."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there as a whole or not at all, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link, or a pipe
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    settle(path.parent)


def settle(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems know no such thing
            os.fsync(handle)
    finally:
        os.close(handle)


def _name(count: int) -> str:
    return f"{count:05d}.json"


def _seal(last: str, text: str) -> str:
    return hashlib.sha256(f"{last}\n{text}".encode()).hexdigest()


def _leaves(
    value: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of nested objects that is none itself, under its path."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def _has(value: Any, path: tuple[str, ...]) -> bool:
    for step in path:
        if not isinstance(value, Mapping) or step not in value:
            return False
        value = value[step]
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
