# SPDX-License-Identifier: Apache-2.0
"""Repeats the stages of one block from what `autoround.run.failure` kept of it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hal
from autoround.models import Call, Samples, compat, find_blocks
from autoround.models.survey import WeightView
from autoround.recipe import Recipe
from autoround.run import chains
from autoround.run.course import held_out, samples_at_once, stages_of
from autoround.run.failure import BLOCK, FACTS
from autoround.run.units import Joined
from autoround.stages import BlockTask, LayerTask
from autoround.stages.task import hidden


def reproduce(directory: Path, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Run the block's stages again on the inputs that were kept; what they report.

    Raises what they raised.
    """
    facts = json.loads((directory / FACTS).read_text())
    block, recipe = facts["block"], Recipe(**_tuples(facts["recipe"]))
    state = load_file(directory / BLOCK)
    kept = facts["inputs"]
    inputs = chains.read(directory / kept["file"], {0: kept["tree"]}, torch.empty(0).device)[0]
    config = compat.load_config(str(directory), trust_remote_code)
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    model: Any = compat.skeleton(config, dtype, trust_remote_code)
    modules = find_blocks(model).modules[block["index"] :][: block["count"]]
    module = modules[0] if len(modules) == 1 else Joined(modules)
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)
    layers = {row["name"]: _layer_task(module, row) for row in block["layers"]}
    kind = torch.empty(0).device.type

    def computing() -> Any:
        return torch.autocast(kind, torch.bfloat16, dtype == torch.float32)

    task = BlockTask(block["index"], module, layers, computing)
    floats, quants = (_samples(inputs[name]) for name in ("float", "quantized"))
    task.x, task.floats = quants, floats
    if recipe.calibrates:
        with torch.no_grad():
            task.y = {i: hidden(task.forward(floats.gather([i]), {})) for i in floats.indices}
        task.held = held_out(recipe, quants.indices)
    tokens = floats.hidden(0).shape[1] if recipe.calibrates else 1
    size = samples_at_once(recipe, tokens, torch.empty(0).device)
    for stage in stages_of(recipe, size, lambda t, loss: print(f"step {t}: loss {loss:.4e}")):
        print(f"{type(stage).__name__} on {block['name']}")
        stage.run(task)
    print(f"no failure; {task.report}")
    return task.report


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a recipe has tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _samples(calls: list[tuple[Any, Any]]) -> Samples:
    return Samples({i: Call(args, kwargs) for i, (args, kwargs) in enumerate(calls)})


def _layer_task(module: torch.nn.Module, row: dict[str, Any]) -> LayerTask:
    n, k = row["shape"]
    shape = tuple(row["param_shape"])
    kind = row["transposed"], (), row.get("alternating", False)
    view = WeightView(row["name"], (n, k), row["experts"], (), shape, *kind)
    w = view.matrix(module.get_parameter(row["name"]).detach()).contiguous()
    return LayerTask(hal.Spec.parse(row["spec"]), w, view.restore)
