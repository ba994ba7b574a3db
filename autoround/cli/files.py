# SPDX-License-Identifier: Apache-2.0
"""`autoround export`, `convert`, `verify`: finished files, no model."""

from pathlib import Path
from typing import Annotated

import typer

from autoround.cli.words import Formats, ShardSize, option, say


def export(
    run: Annotated[str, typer.Argument(help="Directory that `autoround quantize` made.")],
    format: Formats,
    output: Annotated[
        Path | None, option("New directory to write. [RUN/FORMAT]", "-o", "--output")
    ] = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a finished run in further formats: no model, no tuning, and proven."""
    from autoround import export as exporting
    from autoround.formats import formats_by_names
    from autoround.recipe import shard_bytes

    rows = formats_by_names(format)
    say(exporting.export(run, rows, output, shard_bytes(max_shard_size)))


def convert(
    source: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint.")],
    format: Formats,
    output: Annotated[Path, typer.Option("-o", "--output", help="New directory to write.")],
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Repack a GPTQ, AWQ, compressed-tensors, MLX or auto-round checkpoint without loss."""
    from autoround import export as exporting
    from autoround.formats import formats_by_names
    from autoround.recipe import shard_bytes

    rows = formats_by_names(format)
    say(exporting.convert(source, rows, output, shard_bytes(max_shard_size)))


def verify(
    directory: Annotated[str, typer.Argument(help="Directory of a finished model.")],
    against: Annotated[str | None, option("The run it came from. [in or beside it]")] = None,
) -> None:
    """Read a finished model back and compare it with its run, bit for bit."""
    from autoround.verify import verify as check

    say([check(directory, against)])
