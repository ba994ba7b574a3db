# SPDX-License-Identifier: Apache-2.0
"""Further formats of what is quantized already: of a run, or of another program's checkpoint."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.formats import OF_FORMAT, Format, Quantized, Target, own_files, target
from autoround.run.artefact import Artefact, places
from autoround.run.directory import check_output, output_directory
from autoround.verify import Verdict, prove
from autoround.version import VERSION


def export(
    run: str | Path, formats: Sequence[Format], output: str | Path | None, max_shard: int
) -> list[Verdict]:
    """Write a run in further formats, each proven against the run.

    ``output`` None = below the run, a directory of each format's name; else as `quantize` lays it
    out. Raises InputError before any work where a format cannot hold the run.
    """
    return prove(write(run, formats, output, max_shard), run)


def write(
    run: str | Path, formats: Sequence[Format], output: str | Path | None, max_shard: int
) -> list[Path]:
    """`export` without the proof; the directories."""
    found = own_files(Path(run))
    if found is None:
        raise InputError(
            f"{run} is no finished run of `autoround quantize`: nothing in it says what a run put "
            "there; for a quantized checkpoint of another program use `autoround convert`"
        )
    files = Quantized(found)
    contents = files.run_contents()
    targets = [target(format, contents) for format in formats]
    where = Path(output) if output else Path(run)
    if output is None and len(formats) == 1:
        where /= formats[0].name.replace(":", "-")
    kept = {key: value for key, value in files.record.items() if key not in OF_FORMAT}
    return _write(files, targets, where, max_shard, kept)


def convert(
    source: str | Path, formats: Sequence[Format], output: str | Path, max_shard: int
) -> list[Verdict]:
    """Repack a quantized checkpoint: the same codes, scales and zero levels in other formats.

    Raises InputError before any work where a format cannot hold them.
    """
    files = Quantized(Path(source))
    contents = files.contents()
    targets = [target(format, contents) for format in formats]
    record = {"autoround": VERSION, "converted_from": files.dialect.name}
    return prove(_write(files, targets, Path(output), max_shard, record), source)


def _write(
    files: Quantized,
    targets: Sequence[Target],
    output: Path,
    max_shard: int,
    record: Mapping[str, Any],
) -> list[Path]:
    """Every tensor of the source once, into all targets."""
    contents, directories = targets[0].contents, places(targets, output)
    for directory in directories:
        check_output(directory)
    with ExitStack() as stack:
        for directory in directories:
            stack.enter_context(output_directory(directory))
        with Artefact(contents, targets, output, max_shard) as artefact:
            for key in contents.tensors:
                if module := contents.modules.get(key):
                    artefact.put(module, files.weight(module))
                else:
                    artefact.keep(key, files.kept(key), None)
        artefact.describe(record)
    return directories
