# SPDX-License-Identifier: Apache-2.0
"""`autoround eval`, `report` and `generate`: a finished model at work."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from autoround.cli.words import Compute, Device, Json, Products, console, option, spelled


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory of a finished model.")],
    against: Annotated[str, typer.Option(help="The float model it was made from.")],
    dataset: Annotated[str | None, option("Text to evaluate on. [bundled held-out text]")] = None,
    nsamples: Annotated[int, typer.Option(help="Samples.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
    device_map: Device = None,
    compute: Products = Compute.exact,
    json_output: Json = False,
) -> None:
    """Compare a quantized model with its float self: perplexity, KL, agreement, speed."""
    import json

    from autoround import evaluate as evaluation
    from autoround.cli.tables import evaluation_table

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
        console().print(evaluation_table(result))


def report(
    run: Annotated[str, typer.Argument(help="What `quantize` wrote, or any quantized model.")],
    against: Annotated[
        str | None, option("The float model it was made from. [the one the run's log names]")
    ] = None,
    output: Annotated[Path | None, option("Where the files go. [RUN]", "-o", "--output")] = None,
    dataset: Annotated[str | None, option("Text to evaluate on. [bundled held-out text]")] = None,
    nsamples: Annotated[int, typer.Option(help="Samples.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
    device_map: Device = None,
) -> None:
    """Write report.html, report.json and the model card README.md of a finished run."""
    from autoround.cli.tables import evaluation_table
    from autoround.report import Choices
    from autoround.report import report as write

    choices = Choices(against, dataset, nsamples, seqlen, device_map)
    found, files = write(run, output, choices)
    console().print(evaluation_table(found.evaluation))
    for file in files:
        console().print(f"written: {file}", soft_wrap=True, markup=False)


def generate(
    model: Annotated[str, typer.Argument(help="Directory of a model, quantized or not.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option(*spelled("--max-new-tokens"), min=1, help="At most so many.")
    ] = 128,
    compute: Products = Compute.exact,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    device_map: Device = None,
) -> None:
    """Continue a text; the tokens a second go to stderr."""
    from autoround.inference import generation

    text = sys.stdin.read() if prompt == "-" else prompt
    writer = generation.Writer(model, compute=compute.value, device_map=device_map)
    for piece in writer.write(text, max_new_tokens, temperature=temperature, seed=seed):
        typer.echo(piece, nl=False)
    typer.echo()
    typer.echo(writer.report, err=True)
