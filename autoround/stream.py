# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest straight from file to file: no model, one tensor at a time.

The outcome is the pipeline's own, byte for byte; see `autoround.models.survey` for the checkpoints
whose names say enough.
"""

import math
import time
from pathlib import Path

import torch

import hal
from autoround.artefact import Artefact, check_output, output_directory, places, run_record
from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.events import BlockDone, Finished, Listener, Planned
from autoround.models.survey import EXPERT, by_names, refuse_names, weight
from autoround.plan import Layer, ModelPlan, make_plan
from autoround.recipe import Recipe, shard_bytes
from autoround.run import BlockReport, Run, peak_bytes


def refuse(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """Why this run needs a model, or None."""
    if recipe.calibrates:
        return "tuning runs the model"
    singled_out = recipe.layer_config or recipe.ignore_layers
    if singled_out and any(EXPERT.search(key) for key in checkpoint.entries):
        return "experts that the model fuses must share a scheme"
    return refuse_names(checkpoint)


def quantize(recipe: Recipe, checkpoint: Checkpoint, output: Path, listener: Listener) -> Run:
    """`pipeline.quantize` for a run that `refuse` has no objection to."""
    started = time.perf_counter()
    check_output(output)
    plan = make_plan(by_names(checkpoint), recipe)
    listener(Planned(plan))
    run = Run(output, plan, None, listener, checkpoint.total_bytes)
    # Not synced to the disk: what takes seconds is made anew after a power cut.
    shard = shard_bytes(recipe.max_shard_size)
    with output_directory(output):
        with Artefact(plan.contents, plan.written, output, shard, durable=False) as artefact:
            _write(checkpoint, plan, artefact, run)
        artefact.describe(run_record(plan, run.record(recipe)))
    run.prove(places(plan.targets, output))
    run.seconds = time.perf_counter() - started
    listener(Finished(run))
    return run


def _write(checkpoint: Checkpoint, plan: ModelPlan, artefact: Artefact, run: Run) -> None:
    """Every tensor of the source in its order, each read once; a report per block."""
    layers = {layer.view.param: layer for layer in plan.layers}
    last = {layers.view.param: i for i, block in enumerate(plan.blocks) for layers in block[-1:]}
    started = time.perf_counter()
    for key in checkpoint.entries:
        if layer := layers.get(key):
            _round(layer, checkpoint, artefact)
        else:
            checkpoint.scan_finite([key])
            artefact.keep(key, checkpoint.get(key))
        if key in last:
            index, now = last[key], time.perf_counter()
            name = f"{plan.contents.blocks}.{index}"
            report = BlockReport(index, name, math.nan, math.nan, now - started, peak_bytes())
            run.blocks.append(report)
            run.tell(BlockDone(report))
            started = now


def _round(layer: Layer, checkpoint: Checkpoint, artefact: Artefact) -> None:
    w = weight(layer.view, checkpoint)
    q = hal.quantize(w, hal.search(w, layer.spec), layer.spec)
    if not torch.isfinite(q.parts["scale"]).all():
        raise InputError(
            f"{layer.view.param}: a scale exceeds {layer.spec.scale}; "
            "leave the layer out with --ignore-layers"
        )
    artefact.put(artefact.contents.modules[layer.view.param], q)
