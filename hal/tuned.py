# SPDX-License-Identifier: Apache-2.0
"""What was measured on this machine: the fastest launch of a kernel for a case.

A JSON file for each device and compiler in the user's cache directory, written by
``python -m hal tune`` and read when a weight is first multiplied. Nothing in it is trusted: whoever
reads a launch takes it only where it changes no bit of a result.
"""

import contextlib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from hal import config
from hal.registry import Case

Launch = dict[str, Any]


def key(case: Case) -> str:
    """What a launch is for: verb, spec, dtype, shape, rows (a bucket), experts."""
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{case.op} {case.spec} {dtype} {case.n}x{case.k} m{case.m} e{case.experts}"


def file(case: Case, compiler: str) -> Path:
    """Where launches for the device of a case are kept. ``compiler``: its name and version."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{case.caps.name} {compiler}").strip("-").lower()
    return config.cache() / "launches" / f"{name}.json"


def find(case: Case, compiler: str) -> Launch:
    """What was measured for a case; empty where nothing was, or the file is not one of ours."""
    found = _read(file(case, compiler)).get(key(case))
    return found if isinstance(found, dict) else {}


def keep(case: Case, compiler: str, launch: Launch) -> None:
    """Note the launch of a case, from now on in this process too."""
    path = file(case, compiler)
    _read.cache_clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**_read(path), key(case): launch}, indent=1) + "\n")
    os.replace(part, path)
    _read.cache_clear()


@cache
def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}
