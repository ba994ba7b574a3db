# SPDX-License-Identifier: Apache-2.0
"""A run that failed without its user's fault: one line, and a directory that tells the rest.

The directory holds ``failure.json`` (command, recipe, block, statistics of its tensors, traceback,
versions, memory, the last lines of the log) and, where a block was at work, the block itself, some
of its inputs and ``reproduce.py``, which repeats its stages without the model or the data.
"""

import json
import platform
import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround.recipe import Recipe
from autoround.run.chains import Digests, Spool
from autoround.run.events import BlockFailed, Event, Planned
from autoround.run.plan import Layer, ModelPlan
from autoround.run.record import Source, peak_bytes, resident_bytes
from autoround.version import VERSION, versions

#: Samples of the inputs that are kept.
SAMPLES = 4
BLOCK, FACTS = "block.safetensors", "failure.json"
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "accelerate")
SCRIPT = f'''"""Repeats the block that failed: python reproduce.py, with autoround {VERSION}."""

from pathlib import Path

from autoround.run.reproduce import reproduce

reproduce(Path(__file__).parent)
'''


@dataclass(frozen=True, slots=True)
class _Scene:
    """A block, or several tuned as one, as it stood when it failed: all on the host, nothing of it
    shared. ``index``: the first's. ``layers``: by their names in it."""

    index: int
    names: tuple[str, ...]
    layers: dict[str, Layer]
    state: dict[str, Tensor]
    chains: dict[str, list[tuple[Any, Any]]]
    statistics: dict[str, Any]


class Recorder:
    """A listener that keeps what a bundle needs: the plan, and the block that failed."""

    def __init__(self) -> None:
        self._plan: ModelPlan | None = None
        self._scene: _Scene | None = None

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        match event:
            case Planned(plan):
                self._plan = plan
            case BlockFailed() if self._plan is not None:
                self._scene = _scene(event, self._plan)

    def bundle(
        self, error: BaseException, recipe: Recipe, source: Source, output: Path, log: Sequence[str]
    ) -> Path:
        """Write the directory, beside ``output`` or where there is room; its path."""
        facts: dict[str, Any] = about(error) | {
            "recipe": recipe.to_json(),
            "model": str(source.model),
            "device": str(source.device),
            "log": [json.loads(line) for line in log],
        }
        scene = self._scene
        if scene is not None:
            facts["block"] = {
                "index": scene.index,
                "name": scene.names[0],
                "count": len(scene.names),
                "layers": [_layer(name, layer) for name, layer in scene.layers.items()],
                "tensors": scene.statistics,
            }
        where = _directory(output)
        if scene is not None and self._plan is not None:
            facts["inputs"] = _write_block(scene, self._plan.contents.home, where)
        (where / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")
        return where


def about(error: BaseException) -> dict[str, Any]:
    """What is true of any failure: the error, where, the versions, the machine, its memory."""
    return {
        "error": said(error),
        "traceback": traceback.format_exception(error),
        "versions": versions(PACKAGES),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "memory": {"resident": resident_bytes(), "peak": peak_bytes()},
    }


def unexpected(error: BaseException, arguments: Sequence[str]) -> str:
    """One line about a failure outside a run, whose facts are in a temporary directory."""
    where = Path(tempfile.mkdtemp(prefix="autoround-failure-"))
    facts = {"command": ["autoround", *arguments]} | about(error)
    (where / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    return f"{said(error)}; details in {where}; next: {advice(error)}"


def said(error: BaseException) -> str:
    """Type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def advice(error: BaseException) -> str:
    """The one thing to do next."""
    text = str(error).lower()
    return next(
        step
        for words, step in ADVICE
        if not words or any(word in text or word == type(error).__name__ for word in words)
    )


#: Words in the error, or its type -> what to do; the first that fits.
ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("MemoryError", "can't allocate memory", "cannot allocate memory", "out of memory"),
        "see what it needs with `autoround plan ... --ram SIZE`, which names the cheapest change",
    ),
    (("no space left", "disk quota"), "free some space, or choose another -o"),
    ((), "send that directory with a report"),
)


def _directory(output: Path) -> Path:
    """A new ``OUTPUT-failure``; elsewhere if that cannot be written."""
    base = output.absolute()
    for n in range(1, 100):
        where = base.with_name(f"{base.name}-failure" + (f"-{n}" if n > 1 else ""))
        try:
            where.mkdir(parents=True)
            return where
        except FileExistsError:
            continue
        except OSError:
            break
    return Path(tempfile.mkdtemp(prefix="autoround-failure-"))


def _scene(event: BlockFailed, plan: ModelPlan) -> _Scene:
    task = event.task
    state = {k: t.detach() for k, t in task.module.state_dict().items() if not t.is_meta}
    chains: dict[str, list[tuple[Any, Any]]] = {}
    for name, samples in (("quantized", task.x), ("float", task.floats)):
        calls = [samples.gather([i]) for i in samples.indices[:SAMPLES]] if samples else []
        chains[name] = []
        with suppress(TypeError):  # a model that gives its blocks objects of its own
            chains[name] = [(_plain(call.args), _plain(call.kwargs)) for call in calls]
    found = {f"weight {k}": t for k, t in state.items()}
    found |= {f"to round {k}": layer.w for k, layer in task.layers.items()}
    for name, own in chains.items():
        found |= {f"input {name} {i}": t for i, call in enumerate(own) for t in _tensors(call)[:1]}
    statistics = {name: describe(t) for name, t in found.items()}
    layers = {
        (f"{at}." if len(event.names) > 1 else "")
        + layer.view.param.removeprefix(f"{name}."): layer
        for at, name in enumerate(event.names)
        for layer in plan.blocks[event.index + at]
    }
    return _Scene(event.index, event.names, layers, state, chains, statistics)


def describe(t: Tensor) -> dict[str, Any]:
    """Shape, dtype and the numbers that betray a broken tensor."""
    facts: dict[str, Any] = {"shape": [*t.shape], "dtype": str(t.dtype).removeprefix("torch.")}
    if t.is_floating_point() and t.numel():
        finite = t[t.isfinite()].float()
        facts["not_finite"] = t.numel() - finite.numel()
        if finite.numel():
            facts |= {
                "min": float(finite.min()),
                "max": float(finite.max()),
                "mean": float(finite.mean()),
                "rms": float(finite.pow(2).mean().sqrt()),
            }
    return facts


def _plain(value: Any) -> Any:
    """Copies of tensors on the host, in tuples, lists and dicts. TypeError for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    inside = items if isinstance(value, dict | tuple | list) else ()
    return [t for item in inside for t in _tensors(item)]


def _layer(name: str, layer: Layer) -> dict[str, Any]:
    view = layer.view
    return {
        "name": name,
        "spec": str(layer.spec),
        "shape": [*view.shape],
        "experts": view.experts,
        "param_shape": [*view.param_shape],
        "transposed": view.transposed,
        "alternating": view.alternating,
    }


def _write_block(scene: _Scene, home: Path, where: Path) -> dict[str, Any] | None:
    """The block's tensors, its inputs, and the script; where the inputs are. A disk that is full
    leaves the facts."""
    from safetensors.torch import save_file

    try:
        save_file({k: t.cpu().contiguous().clone() for k, t in scene.state.items()}, where / BLOCK)
        spool = Spool(where, Digests())
        spool.add({0: scene.chains})
        shutil.copyfile(home / "config.json", where / "config.json")
        (where / "reproduce.py").write_text(SCRIPT)
        return {"file": spool.close(), "tree": spool.trees[0]}
    except (OSError, RuntimeError):
        for path in (where / BLOCK, *where.glob("*chains*")):
            path.unlink(missing_ok=True)
        return None
