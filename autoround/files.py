# SPDX-License-Identifier: Apache-2.0
"""Small files that others wrote, read without trust: ordinary in kind, size and depth."""

import json
import stat
from pathlib import Path
from typing import Any

from autoround.errors import InputError

#: Bytes of the largest file that is taken for settings, an index or a record.
MOST = 100_000_000
#: Objects and lists inside of each other.
DEEPEST = 100
AGAIN = "download it again"


def read_bytes(path: Path, remedy: str = AGAIN, most: int = MOST) -> bytes:
    """The whole of an ordinary file. Raises InputError for a missing, special or oversized one."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no ordinary file; {remedy}")
        if found.st_size > most:
            raise InputError(
                f"{path} has {found.st_size / 1e9:.3g} GB, more than the {most / 1e9:.3g} GB that "
                f"such a file may have; {remedy}"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def parse_json(data: bytes | str, where: str, remedy: str = AGAIN) -> Any:
    """JSON in UTF-8. Raises InputError for what is none, or nested too deeply to be meant."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # a character must not end in its middle
            json.dumps(found, ensure_ascii=False).encode()
        reason = "nested too deeply" if _deep(found) else ""
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if reason:
        raise InputError(f"{where} is not readable JSON ({reason}); {remedy}")
    return found


def _deep(tree: Any) -> bool:
    """Whether there is more inside of each other than those who walk through it can stand."""
    level = [tree]
    for _ in range(DEEPEST):
        level = [
            value
            for part in level
            if isinstance(part, dict | list)
            for value in (part.values() if isinstance(part, dict) else part)
            if isinstance(value, dict | list)
        ]
        if not level:
            return False
    return True


def read_json(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is none."""
    data = parse_json(read_bytes(path, remedy), str(path), remedy)
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, not a JSON object; {remedy}")
    return data
