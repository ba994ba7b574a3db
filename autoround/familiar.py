# SPDX-License-Identifier: Apache-2.0
"""The commands of the known tool: `auto-round`, `-best`, `-light`, `-rtn`, with its flags.

They are `autoround quantize` with a recipe; ``--model`` names the model and ``--output_dir`` the
parent of the result, which is called ``<model>-w4g128`` there. Flags of `settled.SETTLED` are
taken, change nothing, and say so in a line.
"""

import sys

import typer

from autoround import cli
from autoround.errors import InputError
from autoround.settled import SETTLED, settled

MODEL = ("--model", "--model_name", "--model_name_or_path")
OUTPUT = {"-o", "--output", "--output_dir", "--output-dir"}
RENAMED = {
    "--formats": "--format",
    "--train_bs": "--batch-size",
    "--bs": "--batch-size",
    "--seq_len": "--seqlen",
    "--nsample": "--nsamples",
    "--iter": "--iters",
    "--bit": "--bits",
    "--fp_layers": "--ignore-layers",
    "--device": "--device-map",
    "--devices": "--device-map",
}


def translate(arguments: list[str], recipe: str | None) -> list[str]:
    """The same request in our own command's words. Raises InputError without a model."""
    own: list[str] = []
    model = None
    words = iter(_separated(arguments))
    for word in words:
        if word in MODEL:
            model = next(words, None)
        elif _settled(word):
            continue
        elif not own and not word.startswith("-") and model is None:
            model = word
        else:
            own.append(RENAMED.get(word, word))
    if "--help" in own:
        return ["quantize", "--help"]
    if model is None:
        raise InputError("no model given; name it with --model DIRECTORY")
    parent = [] if OUTPUT & set(own) else ["--output_dir", "tmp_autoround"]
    named = ["--recipe", recipe] if recipe else []
    return ["quantize", model, *named, *parent, *own]


def notes(arguments: list[str]) -> list[str]:
    """A line for every flag given that changes nothing here."""
    return [f"{word} {settled(_settled(word))}" for word in arguments if _settled(word)]


def _settled(word: str) -> str:
    """The name of a settled flag, or nothing."""
    name = word.removeprefix("--").replace("-", "_")
    return name if word.startswith("--") and name in SETTLED else ""


def _separated(arguments: list[str]) -> list[str]:
    """``--flag=value`` as two words."""
    words: list[str] = []
    for word in arguments:
        words += word.split("=", 1) if word.startswith("--") else [word]
    return words


def _command(recipe: str | None) -> None:
    try:
        arguments = translate(sys.argv[1:], recipe)
    except InputError as error:
        cli.fail(str(error), 2)
    else:
        for note in notes(sys.argv[1:]):
            typer.echo(f"note: {note}", err=True)
        cli.process(arguments)


def default() -> None:
    """`auto-round`"""
    _command(None)


def best() -> None:
    """`auto-round-best`"""
    _command("best")


def light() -> None:
    """`auto-round-light`"""
    _command("light")


def rtn() -> None:
    """`auto-round-rtn`"""
    _command("rtn")
