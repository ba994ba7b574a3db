# SPDX-License-Identifier: Apache-2.0
"""`report`: how good a finished run is, on one page, as data, and as the card of the model."""

import json
import os
from pathlib import Path

from autoround.errors import InputError
from autoround.files import read_bytes
from autoround.report.card import MARK, card
from autoround.report.facts import Choices, Report, gather
from autoround.report.page import page

__all__ = ["Choices", "Report", "report"]

PAGE, DATA, CARD = "report.html", "report.json", "README.md"


def report(run: str, output: str | Path | None, choices: Choices) -> tuple[Report, list[Path]]:
    """Evaluate a finished directory and write ``report.html``, ``report.json`` and ``README.md``.

    ``run``: what `autoround quantize` wrote, or any directory of a quantized model. ``output``:
    where the files go, None = into ``run``. Raises InputError for what cannot be evaluated, and for
    a README.md that is somebody else's.
    """
    where = Path(run) if output is None else Path(output)
    if _foreign(where / CARD):
        raise InputError(
            f"{where / CARD} is not ours and would be overwritten; move it away, or choose "
            "another directory with -o"
        )
    found = gather(run, choices)
    texts = {
        DATA: json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n",
        CARD: card(found),
        PAGE: page(found),
    }
    try:
        where.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = where / f"{name}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(where / name)
    except OSError as error:
        raise InputError(
            f"cannot write the report to {where} ({error.strerror}); choose another -o"
        ) from None
    return found, [where / name for name in (PAGE, DATA, CARD)]


def _foreign(path: Path) -> bool:
    return path.exists() and MARK.encode() not in read_bytes(path, "move it away")
