# SPDX-License-Identifier: Apache-2.0
"""`autoround doctor`: is this machine fit for a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from autoround.cli.words import Json, console, option


def doctor(
    directory: Annotated[
        Path | None, option("Directory whose disk is timed. [the current]", "--directory")
    ] = None,
    json_output: Json = False,
) -> None:
    """Prove and time the kernels here; look at disk, memory, versions, what is missing."""
    from autoround.cli.tables import doctor_parts
    from autoround.doctor import examine

    found = examine(directory or Path())
    if json_output:
        typer.echo(json.dumps(found.to_json()))
    else:
        out = console()
        for part in doctor_parts(found):
            out.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)
    if not found.sound:
        raise typer.Exit(1)
