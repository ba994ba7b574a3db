# SPDX-License-Identifier: Apache-2.0
"""`autoround list`: the tables of schemes, formats, devices and recipes."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround.cli.words import console

if TYPE_CHECKING:
    from rich.table import Table


class Listing(StrEnum):
    """What can be listed."""

    schemes = "schemes"
    formats = "formats"
    devices = "devices"
    recipes = "recipes"


def listing(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """Show the tables: schemes, formats, devices, recipes."""
    console().print(_listing(what))


def _listing(what: Listing) -> "Table":
    from rich.table import Table

    columns, rows = _rows(what)
    table = Table(*columns)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _rows(what: Listing) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    if what is Listing.schemes:
        from autoround.scheme import SCHEMES

        columns: tuple[str, ...] = ("scheme", "bits", "group size", "symmetric")
        return columns, [(n, s.bits, s.group_size, s.sym) for n, s in SCHEMES.items()]
    if what is Listing.formats:
        from autoround.formats.table import matrix

        return ("format", "about", "bits", "groups", "asymmetric", "mixed"), matrix()
    if what is Listing.recipes:
        from autoround.recipe import RECIPES

        columns = ("recipe", "closed form", "steps", "end to end", "samples", "tokens", "batch")
        return columns, [
            (
                n,
                r.feedback,
                r.iters,
                r.end_to_end,
                *((r.nsamples, r.seqlen, r.batch_size) if r.calibrates else ()),
            )
            for n, r in RECIPES.items()
        ]
    import hal

    found = hal.devices()
    columns = ("device", "name", "arch", "served by")
    return columns, [(d.torch, d.caps.name, d.caps.arch, ", ".join(d.served_by)) for d in found]
