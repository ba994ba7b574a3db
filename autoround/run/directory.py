# SPDX-License-Identifier: Apache-2.0
"""The directory that something is written to: refused, locked, taken away again."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.files import read_json
from autoround.formats import RECORD, own_files
from autoround.run.journal import HOME, LOCK, RUN, Journal, remove

#: What a run, its exports and reports leave in a directory; --fresh removes nothing else.
OURS = (
    "*.safetensors", "*.partial", "*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model", "*.py",
    "*.md", "*.html", "*.log", "*.jsonl", "LICENSE*", "NOTICE*",
)  # fmt: skip


def check_output(output: Path) -> None:
    """Refuse an output that would overwrite something or cannot be written."""
    if output.exists() and (not output.is_dir() or any(p.name != HOME for p in output.iterdir())):
        raise InputError(f"output {output} exists and is not empty; choose a new directory with -o")
    _refuse_unwritable(output)


def _refuse_unwritable(output: Path) -> None:
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()  # without a name: nothing stays, come what may
    except OSError as error:
        raise InputError(
            f"cannot write to {parent} ({error.strerror}); choose another -o"
        ) from None


@contextlib.contextmanager
def output_directory(output: Path) -> Iterator[None]:
    """Create the directory; what fails takes away what it made."""
    made = _missing(output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        _take_away(output, made)
        if isinstance(error, OSError):
            raise _stopped(output, error) from error
        raise


@contextlib.contextmanager
def claim(output: Path, *, fresh: bool = False) -> Iterator[Journal]:
    """The journal of the run in ``output``, which is new, empty, or holds a run; locked meanwhile.

    A failure before anything is committed takes away what was made. Later it leaves it, with a
    note on the exception that says so. ``fresh``: what is there will be replaced once the new run
    begins. Raises InputError for a directory that holds anything else, cannot be written, or is
    being written to by another run.
    """
    begun, record = (output / HOME / RUN).is_file(), finished(output)
    if record is not None and not fresh:
        shutil.rmtree(output / HOME, ignore_errors=True)  # left where a run ended at its very end
        yield Journal(output, record=record)
        return
    if not begun and record is None:
        check_output(output)
    elif fresh:
        _refuse_foreign(output)
    _refuse_unwritable(output)
    made, journal = _missing(output), Journal(output, fresh=fresh)
    journal.directory.mkdir(parents=True, exist_ok=True)
    with _locked(journal.directory / LOCK, output):
        try:
            yield journal
        except BaseException as error:
            if journal.rows:
                raised = _stopped(output, error) if isinstance(error, OSError) else error
                raised.add_note(journal.kept)
                raise raised from error.__cause__ if raised is error else error
            if journal.begun or not (begun or record):
                _take_away(output, made)
                left = "nothing was left behind"
            else:
                left = f"what is in {output} stays"
                if record:
                    shutil.rmtree(journal.directory)
            if isinstance(error, KeyboardInterrupt):
                error.add_note(left)
            if isinstance(error, OSError):
                raise _stopped(output, error) from error
            raise


def finished(output: Path) -> dict[str, Any] | None:
    """The record of a finished run."""
    if (output / HOME / RUN).is_file() or (own := own_files(output)) is None:
        return None
    return read_json(own / RECORD)


def _refuse_foreign(output: Path) -> None:
    for path in output.iterdir():
        if path.is_dir():
            known = path.name == HOME or any((path / name).exists() for name in (RECORD, "logs"))
            known = known or any(path.glob("*.partial")) or not any(path.iterdir())
        else:
            known = any(path.match(pattern) for pattern in OURS)
        if not known:
            raise InputError(
                f"{path} is no part of a run, and --fresh would remove it; move it away first"
            )


@contextlib.contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    busy = f"another run is writing to {output}; wait for it, or choose another -o"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # it has ended this moment, and its journal went
        raise InputError(busy) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(busy) from None
        if not path.exists() or os.stat(path).st_ino != os.fstat(handle).st_ino:
            raise InputError(busy)
        yield
    finally:
        os.close(handle)


def _missing(output: Path) -> list[Path]:
    return [path for path in (output, *output.absolute().parents) if not path.exists()]


def _take_away(output: Path, made: list[Path]) -> None:
    for path in output.iterdir():
        remove(path)
    for path in made:
        with contextlib.suppress(OSError):  # someone else has put something there since
            path.rmdir()


def _stopped(output: Path, error: OSError) -> InputError:
    return InputError(
        f"stopped while writing {output} ({error}); free some space or choose another -o"
    )
