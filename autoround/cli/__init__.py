# SPDX-License-Identifier: Apache-2.0
"""The `autoround` command. Everything heavy is imported inside the commands: help is instant."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

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


def main() -> NoReturn:
    """The process of `autoround`."""
    process(sys.argv[1:])


def process(arguments: list[str]) -> NoReturn:
    """Run the command line and end the process, with an error in one line on stderr.

    A signal counts until the command has ended; from there on the exit code tells of the command.
    """
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(20_000)  # what torch and transformers are made of stays: less looked through
    code = 0
    try:
        run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _end(code)


def _end(code: int) -> NoReturn:
    """What an interpreter does at its end, but for taking torch apart, which is half a second."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk, a pipe that nobody reads: what was said went nowhere
        code = code or 1
    os._exit(code)


def _terminate(*_: object) -> None:
    raise Terminated


def run(arguments: list[str]) -> None:
    """Run the command line; ends in SystemExit: 0 = done, 2 = the input is wrong, 1 = we are."""
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


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
