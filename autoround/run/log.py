# SPDX-License-Identifier: Apache-2.0
"""A run's events as JSON lines: on disk beside the result, and on stdout for programs.

Every line has ``event``, ``time`` (UTC) and ``at`` (seconds since the listener was made); the other
keys are those of `autoround.run.events.to_json`. The log on disk begins with ``started``: the
``command`` and the ``model`` it was given.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from autoround.run.events import Calibrated, Event, Planned, to_json

#: Its name in the directory that a run writes. Times make it differ from run to run: it belongs to
#: no format, and nothing is derived from it but reports.
NAME = "autoround.log"
#: Lines that are kept for a report of a failure.
TAIL = 40


class Lines:
    """Writes every event to a stream, one JSON object a line, flushed."""

    def __init__(self, stream: TextIO) -> None:
        self._write: Callable[[str], object] = stream.write
        self._flush: Callable[[], object] = stream.flush
        self._started = time.perf_counter()

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        self.say(to_json(event))

    def say(self, values: dict[str, Any], *, ready: bool = True) -> None:
        """One line of other values."""
        self._write(line(values, self._started))
        self._flush()


class Log:
    """Appends every event to `NAME` in the run's directory, flushed line by line.

    The directory is the run's to make: lines wait until it has begun with its first block. A disk
    that cannot take the log stops no run. ``tail``: the last lines.
    """

    def __init__(self, output: Path) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._path, self._waiting = output / NAME, list[str]()
        self._started = time.perf_counter()

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        self.say(to_json(event), ready=not isinstance(event, Planned | Calibrated))

    def say(self, values: dict[str, Any], *, ready: bool = True) -> None:
        """One line of other values; not ``ready``: the directory may not be there yet."""
        text = line(values, self._started)
        self.tail.append(text)
        self._waiting.append(text)
        if not ready or not self._path.parent.is_dir():
            return
        try:
            with open(self._path, "a", encoding="utf-8", opener=_at_once) as file:
                file.writelines(self._waiting)
        except OSError:
            return
        self._waiting.clear()


def _at_once(path: str, flags: int) -> int:
    """Opened without waiting for whoever reads a pipe."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def line(values: dict[str, Any], started: float) -> str:
    """One JSON object and a newline; ``started``: `time.perf_counter` of the beginning."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    at = round(time.perf_counter() - started, 3)
    return json.dumps({"event": values["event"], "time": now, "at": at, **values}) + "\n"
