# SPDX-License-Identifier: Apache-2.0
"""The `autoround` command. Everything heavy is imported inside the commands: help is instant."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from autoround.cli.doctor import doctor
from autoround.cli.files import convert, export, verify
from autoround.cli.lists import listing
from autoround.cli.models import evaluate, generate, report
from autoround.cli.quantize import plan, quantize
from autoround.cli.words import Failed, Stopped, noted
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
    app.command(_name)(_function)


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
    """Entry point: an error is one line on stderr; exit code 2 = the input's, 1 = ours."""
    run(sys.argv[1:])


def run(arguments: list[str]) -> None:
    """Run the command line; exits the process."""
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
    except SystemExit as end:  # typer turns ctrl-C into this code without a word
        if end.code == 130:
            fail("stopped; nothing was left behind", 130)
        raise


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
