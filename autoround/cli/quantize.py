# SPDX-License-Identifier: Apache-2.0
"""`autoround quantize` and `plan`, which take the same options."""

import inspect
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround.cli.words import Failed, Json, console, flag, noted, option, say
from autoround.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from autoround.recipe import Recipe
    from autoround.run.events import Listener
    from autoround.run.record import Run, Source


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done: a recipe, a model, where the result goes, and the means given to it."""

    recipe: "Recipe"
    model: str
    output: Path
    device_map: str | None
    trust_remote_code: bool
    low_cpu_mem_usage: bool
    fresh: bool
    budget: str | None
    target_kl: float | None

    def source(self) -> "Source":
        """The model and its means. Raises InputError for a device that is not there."""
        from autoround.options import device_by_name
        from autoround.run.record import Source

        device = device_by_name(self.device_map)
        means = (self.trust_remote_code, self.low_cpu_mem_usage, self.fresh)
        return Source(self.model, device, *means)


def _asked(
    model: Annotated[
        str, typer.Argument(help="Directory of a safetensors checkpoint, or a hub id.")
    ],
    output: Annotated[
        Path | None, option("New directory to write. [MODEL-w4g128]", "-o", "--output")
    ] = None,
    output_dir: Annotated[
        Path | None, option("Where [MODEL-w4g128] is made.", "--output-dir")
    ] = None,
    scheme: Annotated[str | None, option("See `autoround list schemes`. [W4A16]")] = None,
    recipe: Annotated[str | None, option("See `autoround list recipes`. [autoround]")] = None,
    format: Annotated[
        str | None, option("One or several, comma between; see list formats. [auto_round]")
    ] = None,
    serve: Annotated[
        str | None, option("Engine that must load it, vllm or sglang: adjusts, or refuses.")
    ] = None,
    bits: Annotated[int | None, option("Bits of a weight, over the scheme's.")] = None,
    group_size: Annotated[
        int | None, option("Weights that share a scale; -1 = a row.", "--group-size")
    ] = None,
    asym: Annotated[bool, flag("Zero points instead of signed scales.", "--asym")] = False,
    layer_config: Annotated[
        str | None, option("JSON, or a file: layer or pattern -> scheme.", "--layer-config")
    ] = None,
    ignore_layers: Annotated[
        str | None, option("Layers or patterns to keep, comma between.", "--ignore-layers")
    ] = None,
    quant_lm_head: Annotated[
        bool, flag("Quantize the output projection too.", "--quant-lm-head")
    ] = False,
    iters: Annotated[
        int | None, option("Steps of SignRound a block; 0 = round to nearest.")
    ] = None,
    end_to_end: Annotated[
        int | None, option("Steps of all scales together, after the blocks.", "--end-to-end")
    ] = None,
    lr: Annotated[float | None, option("Initial step of the rounding. [1/iters]")] = None,
    minmax_lr: Annotated[
        float | None, option("Initial step of the range. [lr]", "--minmax-lr")
    ] = None,
    dataset: Annotated[str | None, option("Calibration text; see docs. [bundled]")] = None,
    nsamples: Annotated[int | None, option("Calibration samples. [128]")] = None,
    seqlen: Annotated[int | None, option("Tokens a sample. [2048]")] = None,
    batch_size: Annotated[int | None, option("Samples a step. [8]", "--batch-size")] = None,
    gradient_accumulate_steps: Annotated[
        int | None, option("Batches a step. [1]", "--gradient-accumulate-steps")
    ] = None,
    disable_minmax_tuning: Annotated[
        bool, flag("Leave the ranges alone.", "--disable-minmax-tuning")
    ] = False,
    disable_quanted_input: Annotated[
        bool, flag("Tune every block on the float model's inputs.", "--disable-quanted-input")
    ] = False,
    not_use_best_mse: Annotated[
        bool, flag("Keep the last step, not the best.", "--not-use-best-mse")
    ] = False,
    dynamic_max_gap: Annotated[
        int | None, option("Steps without a better one that end a block.", "--dynamic-max-gap")
    ] = None,
    momentum: Annotated[
        float | None, option("Share of earlier gradients that a step keeps. [0]")
    ] = None,
    enable_adam: Annotated[bool, flag("Adam instead of signs.", "--enable-adam", "--adam")] = False,
    nblocks: Annotated[int | None, option("Blocks whose steps are taken together. [1]")] = None,
    to_quant_block_names: Annotated[
        str | None,
        option("Blocks or patterns to quantize, comma between. [all]", "--to-quant-block-names"),
    ] = None,
    seed: Annotated[int | None, option("Seed of every random choice. [42]")] = None,
    budget: Annotated[
        str | None, option("Time to spend, e.g. 30m: as many samples as it allows.")
    ] = None,
    target_kl: Annotated[
        float | None, option("More samples until the KL on held-out text is this.", "--target-kl")
    ] = None,
    max_shard_size: Annotated[str | None, option("Largest file. [5GB]", "--max-shard-size")] = None,
    device_map: Annotated[
        str | None, option("Device to tune on. [the first]", "--device-map")
    ] = None,
    low_cpu_mem_usage: Annotated[
        bool, flag("Keep what passes between blocks in a file.", "--low-cpu-mem-usage")
    ] = False,
    trust_remote_code: Annotated[
        bool, flag("Run the checkpoint's own Python code.", "--trust-remote-code")
    ] = False,
    fresh: Annotated[bool, flag("Begin anew, whatever run the output holds.", "--fresh")] = False,
) -> Job:
    """The options that every command about a run takes: the signature is their documentation."""
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
        "end_to_end": end_to_end,
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
    means = (device_map, trust_remote_code, low_cpu_mem_usage, fresh)
    return Job(built, model, output or named, *means, budget, target_kl)


def _about_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the options of `_asked` too, as the `Job` of its first argument."""
    common = inspect.signature(_asked).parameters
    own = [*inspect.signature(command).parameters.values()][1:]

    @wraps(command)
    def _command(**options: Any) -> None:
        job = _asked(**{name: options.pop(name) for name in common})
        command(job, **options)

    taken = [*common.values(), *own]
    _command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    _command.__annotations__ = {p.name: p.annotation for p in taken}
    return _command


@_about_a_run
def quantize(
    job: Job,
    quiet: Annotated[bool, flag("Print errors only.", "--quiet", "-q")] = False,
    json_output: Annotated[
        bool, flag("Events on stdout, one JSON object a line.", "--json")
    ] = False,
    dry_run: Annotated[
        bool, flag("Say what would be done, and stop; also `plan`.", "--dry-run")
    ] = False,
) -> None:
    """Quantize a model into a new directory."""
    if dry_run:
        _foresee(job, {}, json_output)
        return
    from autoround.run.directory import finished

    try:
        _quantize(job, quiet, json_output)
    except KeyboardInterrupt as stop:  # a run that was on its way has said what it leaves
        if finished(job.output):
            stop.add_note(f"{job.output} is written")
        raise


def _quantize(job: Job, quiet: bool, json_output: bool) -> None:
    """The run and what is said of it."""
    from autoround.cli.tables import summary
    from autoround.cli.terminal import Terminal
    from autoround.run.events import together
    from autoround.run.failure import Recorder, advice, said
    from autoround.run.log import Lines, Log
    from autoround.run.outlook import Forecast

    out = console(quiet, aside=json_output)
    lines = [Lines(sys.stdout)] if json_output else []
    log, recorder = Log(job.output), Recorder()
    log.say(_started(job), ready=False)
    forecast = Forecast(job.recipe, job.source(), job.output, (log, *lines))
    try:
        with Terminal(out, job.recipe.iters, job.output) as terminal:
            run = _run(job, together(log, recorder, *lines, forecast, terminal), out)
    except InputError as error:
        for listener in lines:
            listener.say({"event": "failed", "error": noted(str(error), error), "bundle": None})
        raise
    except Exception as error:
        found = recorder.bundle(error, job.recipe, job.source(), job.output, [*log.tail])
        for listener in lines:
            listener.say(
                {"event": "failed", "error": noted(said(error), error), "bundle": str(found)}
            )
        raise Failed(
            f"{noted(said(error), error)}; details in {found}; next: {advice(error)}"
        ) from error
    out.print(summary(run, forecast.needs))
    say(run.verdicts, out)
    first = run.verdicts[0].directory
    done = "was finished already, and is proven again" if run.already else "is written"
    words = f"{job.output} {done}; next: autoround eval {first} --against {job.model}"
    out.print(words, soft_wrap=True)


def _started(job: Job) -> dict[str, str]:
    """The first line of the log: the command, and where its model is."""
    here = Path(job.model).expanduser()
    model = str(here.resolve()) if here.is_dir() else job.model
    return {"event": "started", "command": shlex.join(["autoround", *sys.argv[1:]]), "model": model}


def _run(job: Job, listener: "Listener", out: "Console") -> "Run":
    """The run, in the way that needs the least: without a model where names say enough."""
    from autoround.checkpoint import Checkpoint, resolve
    from autoround.run import stream

    if job.budget or job.target_kl is not None:
        from autoround.run import budget

        goal = budget.goal(job.budget, job.target_kl)
        run, rungs = budget.quantize(job.recipe, job.source(), job.output, goal, listener=listener)
        for rung in rungs:
            out.print(rung)
        return run
    checkpoint = None if job.recipe.calibrates else Checkpoint(resolve(job.model))
    source = job.source()
    if checkpoint and stream.refuse(job.recipe, checkpoint) is None:
        return stream.quantize(job.recipe, checkpoint, job.output, listener, fresh=job.fresh)
    from autoround.run import pipeline

    return pipeline.quantize(job.recipe, source, job.output, listener=listener)


@_about_a_run
def plan(
    job: Job,
    ram: Annotated[str | None, option("Memory there is, e.g. 16GB: what makes it fit?")] = None,
    vram: Annotated[str | None, option("Memory of the device, e.g. 8GB.")] = None,
    disk: Annotated[str | None, option("Room on the disk, e.g. 20GB.")] = None,
    probe: Annotated[
        bool, flag("Try the first blocks, for the time it will take.", "--probe")
    ] = False,
    json_output: Json = False,
) -> None:
    """Say what `quantize` would do, to the byte, from headers alone; exit code 1 = does not fit."""
    _foresee(job, {"ram": ram, "vram": vram, "disk": disk}, json_output, probed=probe)


def _foresee(
    job: Job, given: "dict[str, str | None]", json_output: bool, *, probed: bool = False
) -> None:
    from autoround.cli.tables import outlook_tables
    from autoround.run.estimate import Limits, bytes_of
    from autoround.run.outlook import outlook

    limits = Limits(**{name: bytes_of(text, name) for name, text in given.items() if text})
    found = outlook(job.recipe, job.source(), job.output, limits, probed=probed)
    if json_output:
        typer.echo(json.dumps(found.to_json()))
    else:
        for part in outlook_tables(found):
            console().print(part, soft_wrap=isinstance(part, str), highlight=False)
    if found.fit.refused:
        raise typer.Exit(1)
