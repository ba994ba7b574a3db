# SPDX-License-Identifier: Apache-2.0
"""The `autoround` command. Everything heavy is imported inside the commands: help is instant."""

import sys
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround.errors import InputError
from autoround.version import VERSION

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from autoround.verify import Verdict

app = typer.Typer(
    name="autoround",
    help="Quantize language models to 2-8 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Compute(StrEnum):
    exact = "exact"
    fast = "fast"


class Listing(StrEnum):
    schemes = "schemes"
    formats = "formats"
    devices = "devices"
    recipes = "recipes"


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


Formats = Annotated[str, typer.Option(help="One or several, comma between; see list formats.")]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", "--max_shard_size", help="Largest file.")
]


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="Directory of a safetensors checkpoint, or a hub id.")
    ],
    output: Annotated[
        Path | None, _option("New directory to write. [MODEL-w4g128]", "-o", "--output")
    ] = None,
    output_dir: Annotated[
        Path | None, _option("Where [MODEL-w4g128] is made.", "--output-dir", "--output_dir")
    ] = None,
    scheme: Annotated[str | None, _option("See `autoround list schemes`. [W4A16]")] = None,
    recipe: Annotated[str | None, _option("See `autoround list recipes`. [autoround]")] = None,
    format: Annotated[
        str | None, _option("One or several, comma between; see list formats. [auto_round]")
    ] = None,
    serve: Annotated[
        str | None, _option("Engine that must load it, vllm or sglang: adjusts, or refuses.")
    ] = None,
    bits: Annotated[int | None, _option("Bits of a weight, over the scheme's.")] = None,
    group_size: Annotated[
        int | None,
        _option("Weights that share a scale; -1 = a row.", "--group-size", "--group_size"),
    ] = None,
    asym: Annotated[
        bool, typer.Option("--asym", help="Zero points instead of signed scales.")
    ] = False,
    layer_config: Annotated[
        str | None,
        _option("JSON, or a file: layer or pattern -> scheme.", "--layer-config", "--layer_config"),
    ] = None,
    ignore_layers: Annotated[
        str | None,
        _option("Layers or patterns to keep, comma between.", "--ignore-layers", "--ignore_layers"),
    ] = None,
    quant_lm_head: Annotated[
        bool,
        typer.Option(
            "--quant-lm-head", "--quant_lm_head", help="Quantize the output projection too."
        ),
    ] = False,
    iters: Annotated[
        int | None, _option("Steps of SignRound a block; 0 = round to nearest.")
    ] = None,
    lr: Annotated[float | None, _option("Initial step of the rounding. [1/iters]")] = None,
    minmax_lr: Annotated[
        float | None, _option("Initial step of the range. [lr]", "--minmax-lr", "--minmax_lr")
    ] = None,
    dataset: Annotated[str | None, _option("Calibration text; see docs. [bundled]")] = None,
    nsamples: Annotated[int | None, _option("Calibration samples. [128]")] = None,
    seqlen: Annotated[int | None, _option("Tokens a sample. [2048]")] = None,
    batch_size: Annotated[
        int | None, _option("Samples a step. [8]", "--batch-size", "--batch_size")
    ] = None,
    gradient_accumulate_steps: Annotated[
        int | None,
        _option(
            "Batches a step. [1]", "--gradient-accumulate-steps", "--gradient_accumulate_steps"
        ),
    ] = None,
    disable_minmax_tuning: Annotated[
        bool,
        typer.Option(
            "--disable-minmax-tuning", "--disable_minmax_tuning", help="Leave the ranges alone."
        ),
    ] = False,
    disable_quanted_input: Annotated[
        bool,
        typer.Option(
            "--disable-quanted-input",
            "--disable_quanted_input",
            help="Tune every block on the float model's inputs.",
        ),
    ] = False,
    not_use_best_mse: Annotated[
        bool,
        typer.Option(
            "--not-use-best-mse", "--not_use_best_mse", help="Keep the last step, not the best."
        ),
    ] = False,
    dynamic_max_gap: Annotated[
        int | None,
        _option(
            "Steps without a better one that end a block.", "--dynamic-max-gap", "--dynamic_max_gap"
        ),
    ] = None,
    momentum: Annotated[
        float | None, _option("Share of earlier gradients that a step keeps. [0]")
    ] = None,
    enable_adam: Annotated[
        bool,
        typer.Option("--enable-adam", "--enable_adam", "--adam", help="Adam instead of signs."),
    ] = False,
    nblocks: Annotated[int | None, _option("Blocks tuned jointly: only 1.")] = None,
    to_quant_block_names: Annotated[
        str | None,
        _option(
            "Blocks or patterns to quantize, comma between. [all]",
            "--to-quant-block-names",
            "--to_quant_block_names",
        ),
    ] = None,
    seed: Annotated[int | None, _option("Seed of every random choice. [42]")] = None,
    budget: Annotated[
        str | None, _option("Time to spend, e.g. 30m: as many samples as it allows.")
    ] = None,
    target_kl: Annotated[
        float | None,
        _option(
            "More samples until the KL on held-out text is this.", "--target-kl", "--target_kl"
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, _option("Largest file. [5GB]", "--max-shard-size", "--max_shard_size")
    ] = None,
    device_map: Annotated[
        str | None, _option("Device to tune on. [the first]", "--device-map", "--device_map")
    ] = None,
    low_cpu_mem_usage: Annotated[
        bool,
        typer.Option(
            "--low-cpu-mem-usage",
            "--low_cpu_mem_usage",
            help="Keep what passes between blocks in a file.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and stop; also `plan`.")
    ] = False,
) -> None:
    """Quantize a model into a new directory."""
    from autoround.options import build_recipe, default_output, parse_layer_config, split_names

    changes = {
        "scheme": scheme,
        "format": format,
        "serve": serve,
        "bits": bits,
        "group_size": group_size,
        "sym": False if asym else None,
        "layer_config": parse_layer_config(layer_config) if layer_config else None,
        "ignore_layers": split_names(ignore_layers),
        "quant_lm_head": quant_lm_head or None,
        "iters": iters,
        "lr": lr,
        "minmax_lr": minmax_lr,
        "dataset": dataset,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "gradient_accumulate_steps": gradient_accumulate_steps,
        "enable_minmax_tuning": False if disable_minmax_tuning else None,
        "enable_quanted_input": False if disable_quanted_input else None,
        "not_use_best_mse": not_use_best_mse or None,
        "dynamic_max_gap": dynamic_max_gap,
        "momentum": momentum,
        "enable_adam": enable_adam or None,
        "nblocks": nblocks,
        "to_quant_block_names": split_names(to_quant_block_names),
        "seed": seed,
        "max_shard_size": max_shard_size,
    }
    built = build_recipe(recipe, changes)
    named = (output_dir or Path()) / default_output(model, built.weight_scheme)
    if output and output_dir:
        raise InputError("give -o (the directory itself) or --output-dir (its parent), not both")
    if nsamples and (budget or target_kl):
        raise InputError("budget and target_kl choose the samples; leave nsamples out")
    if dry_run:
        _outlook(built, model, output or named, (device_map, trust_remote_code))
        return
    how = (device_map, trust_remote_code, low_cpu_mem_usage, quiet)
    _run(built, model, output or named, how, (budget, target_kl))


@app.command(name="plan", help="Say what `quantize` would do, to the byte, from headers alone.")
@wraps(quantize)
def _plan(**options: Any) -> None:
    quantize(**{**options, "dry_run": True})


def _outlook(recipe: Any, model: str, output: Path, how: tuple[str | None, bool]) -> None:
    from autoround.options import device_by_name
    from autoround.outlook import outlook
    from autoround.run import Source
    from autoround.terminal import outlook_tables

    found = outlook(recipe, Source(model, device_by_name(how[0]), how[1]), output)
    for part in outlook_tables(found):
        _console(False).print(part, soft_wrap=isinstance(part, str))


def _run(
    recipe: Any,
    model: str,
    output: Path,
    how: tuple[str | None, bool, bool, bool],
    wanted: tuple[str | None, float | None],
) -> None:
    from autoround import stream
    from autoround.checkpoint import Checkpoint, resolve
    from autoround.options import device_by_name
    from autoround.terminal import Terminal, summary

    device_map, trust_remote_code, low_cpu_mem_usage, quiet = how
    console, device = _console(quiet), device_by_name(device_map)
    checkpoint = None if recipe.calibrates else Checkpoint(resolve(model))
    with Terminal(console, recipe.iters) as terminal:
        if wanted != (None, None):
            from autoround import budget
            from autoround.run import Source

            source = Source(model, device, trust_remote_code, low_cpu_mem_usage)
            aim = budget.goal(*wanted)
            run, rungs = budget.quantize(recipe, source, output, aim, progress=terminal)
            for rung in rungs:
                console.print(rung)
        elif checkpoint and stream.refuse(recipe, checkpoint) is None:
            run = stream.quantize(recipe, checkpoint, output, terminal)
        else:
            from autoround import pipeline
            from autoround.run import Source

            source = Source(model, device, trust_remote_code, low_cpu_mem_usage)
            run = pipeline.quantize(recipe, source, output, progress=terminal)
    console.print(summary(run, run.source_bytes))
    _verdicts([] if quiet else run.verdicts)
    first = run.verdicts[0].directory
    console.print(
        f"written to {output}; next: autoround eval {first} --against {model}", soft_wrap=True
    )


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Directory that `autoround quantize` made.")],
    format: Formats,
    output: Annotated[
        Path | None, _option("New directory to write. [RUN/FORMAT]", "-o", "--output")
    ] = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a finished run in further formats: no model, no tuning, and proven."""
    from autoround import export as exporting
    from autoround.formats import formats_by_names
    from autoround.recipe import shard_bytes

    rows = formats_by_names(format)
    _verdicts(exporting.export(run, rows, output, shard_bytes(max_shard_size)))


@app.command()
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
    _verdicts(exporting.convert(source, rows, output, shard_bytes(max_shard_size)))


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(help="Directory of a finished model.")],
    against: Annotated[str | None, _option("The run it came from. [in or beside it]")] = None,
) -> None:
    """Read a finished model back and compare it with its run, bit for bit."""
    from autoround.verify import verify as check

    _verdicts([check(directory, against)])


def _verdicts(found: "list[Verdict]") -> None:
    """One line a directory and one a difference; exit code 1 where there are any."""
    console = _console(False)
    for verdict in found:
        console.print(str(verdict), soft_wrap=True, markup=False)
        for difference in verdict.differences:
            console.print(f"  {difference}", soft_wrap=True, markup=False)
    if not all(verdict.ok for verdict in found):
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory of a finished model.")],
    against: Annotated[str, typer.Option(help="The float model it was made from.")],
    dataset: Annotated[str | None, _option("Text to evaluate on. [bundled held-out text]")] = None,
    nsamples: Annotated[int, typer.Option(help="Samples.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
    device_map: Annotated[
        str | None, _option("Device to run on. [the first]", "--device-map", "--device_map")
    ] = None,
    compute: Annotated[
        Compute, typer.Option(help="exact, or fast: activations in 8 bits where that is faster.")
    ] = Compute.exact,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare a quantized model with its float self: perplexity, KL, agreement, speed."""
    import json

    from autoround import evaluate as evaluation
    from autoround.terminal import evaluation_table

    result = evaluation.evaluate(
        model,
        against,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        device_map=device_map,
        compute=compute.value,
    )
    if json_output:
        typer.echo(json.dumps(result.to_json()))
    else:
        _console(False).print(evaluation_table(result))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Directory of a model, quantized or not.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="At most so many.")
    ] = 128,
    compute: Annotated[
        Compute, typer.Option(help="exact, or fast: activations in 8 bits where that is faster.")
    ] = Compute.exact,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    device_map: Annotated[
        str | None, _option("Device to run on. [the first]", "--device-map", "--device_map")
    ] = None,
) -> None:
    """Continue a text; the tokens a second go to stderr."""
    from autoround import generation

    text = sys.stdin.read() if prompt == "-" else prompt
    writer = generation.Writer(model, compute=compute.value, device_map=device_map)
    for piece in writer.write(text, max_new_tokens, temperature=temperature, seed=seed):
        typer.echo(piece, nl=False)
    typer.echo()
    typer.echo(writer.report, err=True)


@app.command(name="list")
def list_(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """Show the tables: schemes, formats, devices, recipes."""
    _console(False).print(_listing(what))


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

        columns = ("recipe", "closed form", "steps", "samples", "tokens", "batch")
        return columns, [
            (
                n,
                r.feedback,
                r.iters,
                *((r.nsamples, r.seqlen, r.batch_size) if r.calibrates else ()),
            )
            for n, r in RECIPES.items()
        ]
    import hal

    found = hal.devices()
    columns = ("device", "name", "arch", "served by")
    return columns, [(d.torch, d.caps.name, d.caps.arch, ", ".join(d.served_by)) for d in found]


def _console(quiet: bool) -> "Console":
    from rich.console import Console

    return Console(quiet=quiet)


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
    """Entry point: input errors are one line on stderr and exit code 2."""
    run(sys.argv[1:])


def run(arguments: list[str]) -> None:
    """Run the command line; exits the process."""
    try:
        app(arguments)
    except InputError as error:
        fail(str(error), 2)
    except SystemExit as end:  # typer turns ctrl-C into this code without a word
        if end.code == 130:
            fail("stopped; nothing was left behind", 130)
        raise


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
