# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything and computed nothing, and forks `autoround` commands.

One JSON object a line on stdin, one answer a line on stdout. A start takes milliseconds instead of
seconds, and a forked child is a process like any other: it can be killed at any instant.

    arguments   of the command
    said        file that takes what it prints
    kill        [seconds, signal]: sent from outside after that time
    fault       [number, how]: at that call which changes the disk, counted from 0:
                before, torn, after: SIGKILL; full: ENOSPC from there on; broken: no OSError
    limits      name of a resource -> its limit
"""

import errno
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Functions of os that change the disk.
CALLS = ("pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir", "posix_fallocate")
FAMILIES = ("llama", "qwen3", "qwen3_moe", "mixtral", "gpt2")


def _watched(fault: tuple[int, str] | None, counter: int) -> None:
    """Wrap CALLS: the count of them goes to a file descriptor, a fault happens at its number."""
    seen = 0

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal seen
            number, seen = seen, seen + 1
            original_write(counter, b".")
            at, how = fault or (-1, "")
            if how == "full" and number >= at and name in ("pwrite", "mkdir", "posix_fallocate"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number >= at and how == "broken" and name == "pwrite":
                raise ZeroDivisionError("a writer")
            if number != at or how in ("full", "broken"):
                return original(*args, **named)
            if how == "torn" and name == "pwrite":
                original(args[0], args[1][: len(args[1]) // 2], args[2])
            elif how == "after":
                original(*args, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    original_write = os.write
    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def _child(wanted: dict[str, Any], counter: int) -> None:
    said = os.open(wanted["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(said, stream)
    try:
        from autoround import cli

        for name, limit in wanted.get("limits", {}).items():
            kind = getattr(resource, name)
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        _watched(wanted.get("fault"), counter)
        sys.argv = ["autoround", *wanted["arguments"]]
        cli.main()  # ends the process
    finally:
        os._exit(99)


def _one(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run a command; its exit status (negative: a signal) and the number of its calls."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    child = os.fork()
    if child == 0:
        _child(wanted, writing)
    os.close(writing)
    deadline, calls, started = None, 0, time.monotonic()
    if wanted.get("kill"):
        deadline, number = started + wanted["kill"][0], wanted["kill"][1]
    while True:
        with suppress(BlockingIOError):
            calls += len(os.read(reading, 1 << 16))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, number)
            deadline = None
        time.sleep(0.001)
    with suppress(BlockingIOError):
        while piece := os.read(reading, 1 << 16):
            calls += len(piece)
    os.close(reading)
    seconds = time.monotonic() - started
    return {"status": os.waitstatus_to_exitcode(status), "calls": calls, "seconds": seconds}


def main() -> None:
    for module in (
        "autoround.cli",
        "autoround.run.pipeline",
        "autoround.run.failure",
        "autoround.cli.terminal",
    ):
        importlib.import_module(module)
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
