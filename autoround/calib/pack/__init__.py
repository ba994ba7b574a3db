# SPDX-License-Identifier: Apache-2.0
"""The text that ships inside the wheel: a calibration pack and a held-out pack.

Both are xz-compressed JSON lines ``{"source", "text"}``; ``PROVENANCE.md`` names every source and
licence. Reading one checks the sha256 of its rows, so a result can be tied to an exact text.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from importlib import resources

from autoround.calib.pack.digests import CALIBRATION_SHA256, HELDOUT_SHA256

__all__ = ["CALIBRATION_SHA256", "HELDOUT_SHA256", "PackRow", "calibration", "heldout", "rows"]

_DIGESTS = {"calibration": CALIBRATION_SHA256, "heldout": HELDOUT_SHA256}


@dataclass(frozen=True, slots=True)
class PackRow:
    """One text and the name of the source it came from (the first column of PROVENANCE.md)."""

    source: str
    text: str


def calibration() -> list[str]:
    """The calibration texts, sources mixed in proportion."""
    return [row.text for row in rows("calibration")]


def heldout() -> list[str]:
    """The held-out texts; they share no 13-word run with the calibration texts."""
    return [row.text for row in rows("heldout")]


def rows(name: str) -> list[PackRow]:
    """All rows of pack ``"calibration"`` or ``"heldout"``.

    Raises RuntimeError when the file is missing or is not the one this version was built with.
    """
    resource = resources.files(__name__).joinpath(f"{name}.jsonl.xz")
    try:
        raw = lzma.decompress(resource.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise RuntimeError(
            f"text pack {name!r} cannot be read ({error}): reinstall autoround"
        ) from error
    if hashlib.sha256(raw).hexdigest() != _DIGESTS[name]:
        raise RuntimeError(
            f"text pack {name!r} is not the one of this version: reinstall autoround"
        )
    return [PackRow(**json.loads(line)) for line in raw.splitlines()]
