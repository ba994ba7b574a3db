# SPDX-License-Identifier: Apache-2.0
"""What several commands take and say: their options, the console, the outcome of a proof."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from autoround.verify import Verdict


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as ctrl-C does."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM become `Stopped`, with what a run says of what it leaves."""
    try:
        yield
    except KeyboardInterrupt as stop:
        number = SIGTERM if isinstance(stop, Terminated) else SIGINT
        raise Stopped(noted("stopped", stop), number) from None


def noted(message: str, error: BaseException) -> str:
    """A message, and what the run says of what it leaves (`autoround.run.directory.claim`)."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


class Compute(StrEnum):
    """Policy of products."""

    exact = "exact"
    fast = "fast"


class Failed(Exception):
    """Not the user's fault: one line that says what happened, where the facts are, what next."""


class Stopped(BaseException):
    """A command was told to stop by a signal, no error: what is left of it, and the exit code."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


def option(help: str, *names: str) -> Any:
    """An option without a default of its own to show; ``--a-b`` may be written ``--a_b``."""
    return typer.Option(*spelled(*names), help=help, show_default=False)


def flag(help: str, *names: str) -> Any:
    """An option that takes no value; there is no ``--no-`` of it."""
    return typer.Option(*spelled(*names), help=help)


def spelled(*names: str) -> Iterator[str]:
    """Each name, and with underscores where it has a hyphen, as the known tool writes it."""
    for name in names:
        yield name
        if "-" in name.lstrip("-"):
            yield "--" + name.lstrip("-").replace("-", "_")


Formats = Annotated[str, typer.Option(help="One or several, comma between; see list formats.")]
ShardSize = Annotated[str, typer.Option(*spelled("--max-shard-size"), help="Largest file.")]
Device = Annotated[str | None, option("Device to run on. [the first]", "--device-map")]
Products = Annotated[
    Compute, typer.Option(help="exact, or fast: activations in 8 bits where that is faster.")
]
Json = Annotated[bool, flag("One JSON object.", "--json")]


def console(quiet: bool = False, *, aside: bool = False) -> "Console":
    """Where human text goes: stdout; ``aside``: stderr, where stdout is for programs."""
    from rich.console import Console

    return Console(quiet=quiet, stderr=aside)


def say(found: "list[Verdict]", out: "Console | None" = None) -> None:
    """One line a directory and one a difference; exit code 1 where there are any."""
    out = out or console()
    for verdict in found:
        out.print(str(verdict), soft_wrap=True, markup=False)
        for difference in verdict.differences:
            out.print(f"  {difference}", soft_wrap=True, markup=False)
    if not all(verdict.ok for verdict in found):
        raise typer.Exit(1)
