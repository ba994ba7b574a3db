# SPDX-License-Identifier: Apache-2.0
"""What a run's log on disk adds to its record: times, memory, the command. Lines may be broken."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoround.run.log import NAME

#: Longer logs are read from their end.
MOST = 1 << 26


@dataclass(slots=True)
class Log:
    """``blocks``: name -> seconds and peak bytes. All empty where there is no log."""

    command: str | None = None
    model: str | None = None
    seconds: float | None = None
    blocks: dict[str, tuple[float | None, int | None]] = field(default_factory=dict)


def read_log(*directories: Path) -> Log:
    """The first log among these directories; the last line that says a thing counts."""
    found = Log()
    file = next((d / NAME for d in directories if (d / NAME).is_file()), None)
    for event in _events(file) if file else ():
        command, model, seconds = (event.get(key) for key in ("command", "model", "seconds"))
        if isinstance(command, str):
            found.command = command
        if isinstance(model, str):
            found.model = model
        if event.get("event") == "block_done" and isinstance(event.get("name"), str):
            found.blocks[event["name"]] = (_number(seconds), _count(event.get("peak_bytes")))
        elif event.get("event") == "finished":
            found.seconds = _number(seconds)
    return found


def _events(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - MOST))
            lines = opened.read(MOST).split(b"\n")
    except OSError:  # a log that cannot be read is none
        return
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            yield event


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
    return float(value) if good else None


def _count(value: Any) -> int | None:
    found = _number(value)
    return None if found is None else int(found)
