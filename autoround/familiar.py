# SPDX-License-Identifier: Apache-2.0
"""The commands of the known tool: `auto-round`, `-best`, `-light`, `-rtn`, with its flags.

They are `autoround quantize` with a recipe; ``--model`` names the model and ``--output_dir`` the
parent of the result, which is called ``<model>-w4g128`` there. Flags for low memory, determinism
and compilation are taken and change nothing: blocks are streamed, runs repeat, kernels are native.
"""

import sys

from autoround import cli
from autoround.errors import InputError

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

#: What the known tool does on request only and we always do, or have no need of.
ALWAYS = {
    "--low_gpu_mem_usage",
    "--enable_deterministic_algorithms",
    "--enable_torch_compile",
    "--disable_torch_compile",
}


def translate(arguments: list[str], recipe: str | None) -> list[str]:
    """The same request in our own command's words. Raises InputError without a model."""
    own: list[str] = []
    model = None
    words = iter(_separated(arguments))
    for word in words:
        if word in MODEL:
            model = next(words, None)
        elif word in ALWAYS:
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
        cli.run(arguments)


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
