# SPDX-License-Identifier: Apache-2.0
"""The `autoround` command. Everything heavy is imported inside the commands: help is instant."""

import gc
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from autoround.cli.doctor import doctor
from autoround.cli.files import convert, export, verify
from autoround.cli.lists import listing
from autoround.cli.models import evaluate, generate, report
from autoround.cli.quantize import plan, quantize
from autoround.cli.words import Failed, Stopped, Terminated, noted, stoppable
from autoround.errors import InputError
from autoround.version import VERSION

#: Every command, in the order in which help shows them.
COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "plan": plan,
    "export": export,
    "convert": convert,
    "verify": verify,
    "eval": evaluate,
    "report": report,
    "generate": generate,
    "list": listing,
    "doctor": doctor,
}

app = typer.Typer(
    name="autoround",
    help="Quantize language models to 2-8 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in COMMANDS.items():
    app.command(_name)(stoppable()(_function))


def _version(show: bool) -> None:
    if show:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: an error is one line on stderr; exit code 2 = the input's, 1 = ours.

    A signal counts until the command has ended; from there on the exit code tells of the command.
    """
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(20_000)  # what torch and transformers are made of stays: less looked through
    try:
        run(sys.argv[1:])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        gc.freeze()  # or its end looks through all of them once more: half a second


def _terminate(*_: object) -> None:
    raise Terminated


def run(arguments: list[str]) -> None:
    """Run the command line; raises SystemExit with a number."""
    try:
        app(arguments)
    except InputError as error:
        fail(noted(str(error), error), 2)
    except Failed as error:
        fail(str(error), 1)
    except Stopped as stop:
        fail(str(stop), stop.code)
    except Exception as error:
        from autoround.run.failure import unexpected

        fail(unexpected(error, arguments), 1)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
