# SPDX-License-Identifier: Apache-2.0
"""What a run would do, from headers alone: every weight's fate, every file's size, the kernels."""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hal
from autoround import models
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.formats import Module, Target
from autoround.formats.sink import file_sizes
from autoround.models.survey import by_names
from autoround.recipe import Recipe, shard_bytes
from autoround.run import stream
from autoround.run.artefact import places
from autoround.run.estimate import Limits, Needs, needs, savings
from autoround.run.events import Event, Planned
from autoround.run.log import Lines, Log
from autoround.run.plan import ModelPlan, make_plan
from autoround.run.record import Source, free_bytes, resident_bytes

if TYPE_CHECKING:  # a run that builds no model imports no transformers
    from autoround.run.probe import Pace


@dataclass(frozen=True, slots=True)
class Kind:
    """Weights that are alike: a name with ``*`` for numbers, what they get, what multiplies them.

    ``nbytes``: in the first format. ``kernels``: of one row, of many; or why they are kept.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    kernels: str


@dataclass(frozen=True, slots=True)
class Fit:
    """``refused``: what does not fit, None = all does. ``change``: the cheapest options that make
    it fit, and the needs then; None where nothing known does."""

    refused: str | None = None
    change: tuple[str, Needs] | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """``files``: directory -> name and bytes of each file of weights, exactly as they will be.
    ``free``: bytes of the disk that the output goes to. ``needs``: memory and disk of the run.
    ``fit``: whether that is within the limits given, and if not, what would be.
    ``pace``: the time, where it was probed."""

    plan: ModelPlan
    kinds: tuple[Kind, ...]
    files: dict[Path, dict[str, int]]
    free: int
    needs: Needs
    fit: Fit
    pace: "Pace | None" = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return _total(self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        changed = self.fit.change
        return {
            "files": {str(place): sizes for place, sizes in self.files.items()},
            "nbytes": self.nbytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "formats": [target.packing.name for target in self.plan.targets],
            "tensors": self.plan.fates,
            "weights": [asdict(kind) for kind in self.kinds],
            "ram": self.needs.ram,
            "memory": self.needs.memory,
            "vram": self.needs.device,
            "disk": self.needs.disk,
            "free": self.free,
            "seconds": self.pace and self.pace.seconds,
            "seconds_range": self.pace and [*self.pace.range],
            "fits": self.fit.refused is None,
            "refused": self.fit.refused,
            "change": changed and {"options": changed[0], "ram": changed[1].ram,
                                   "vram": changed[1].device, "disk": changed[1].disk},
        }  # fmt: skip


def outlook(
    recipe: Recipe,
    source: Source,
    output: Path,
    limits: Limits | None = None,
    *,
    probed: bool = False,
) -> Outlook:
    """Decide everything that headers decide. Raises InputError for what a run would refuse.

    ``probed``: and try the first blocks, for the time.

    Memory is that of a run in a process like this one, which has imported the same.
    """
    checkpoint = Checkpoint(resolve(str(source.model)))
    if stream.refuse(recipe, checkpoint) is None:
        survey, dtype = by_names(checkpoint), torch.bfloat16
    else:
        streamed = models.StreamedModel(
            checkpoint, device=source.device, trust_remote_code=source.trust_remote_code
        )
        survey, dtype = models.survey_of(streamed), streamed.dtype
    plan = make_plan(survey, recipe)
    files, free, base = planned_files(plan, recipe, output), free_bytes(output), resident_bytes()

    def need(recipe: Recipe, low: bool) -> Needs:
        made = plan if recipe.format == asked else make_plan(survey, recipe)
        nbytes = _total(planned_files(made, recipe, output))
        accelerated = source.device.type != torch.empty(0).device.type
        return needs(made, recipe, base, files=nbytes, low_memory=low, accelerated=accelerated)

    asked = recipe.format
    needed = need(recipe, source.low_cpu_mem_usage)
    fit = _fit(limits or Limits(), needed, recipe, source.low_cpu_mem_usage, need)
    kinds = tuple(_kinds(plan, dtype, source.device))
    found = Outlook(plan, kinds, files, free, needed, fit)
    if found.nbytes > free:
        parent = next(p for p in (output, *output.absolute().parents) if p.exists())
        raise InputError(
            f"{parent} has {free / 1e9:.2f} GB free, the run writes {found.nbytes / 1e9:.2f} GB; "
            "choose another -o, or fewer formats"
        )
    if probed:
        from autoround.run.probe import pace

        return replace(found, pace=pace(recipe, source, output))
    return found


def planned_files(plan: ModelPlan, recipe: Recipe, output: Path) -> dict[Path, dict[str, int]]:
    """Directory -> name and bytes of each file of weights."""
    size = shard_bytes(recipe.max_shard_size)
    return {
        place: file_sizes(target.stored, size, target.format.metadata)
        for place, target in zip(places(plan.written, output), plan.written, strict=True)
    }


def _total(files: dict[Path, dict[str, int]]) -> int:
    return sum(sum(sizes.values()) for sizes in files.values())


def _fit(
    limits: Limits,
    needed: Needs,
    recipe: Recipe,
    low: bool,
    need: Callable[[Recipe, bool], Needs],
) -> Fit:
    refused = limits.refuse(needed)
    if refused is None:
        return Fit()
    for words, changed, with_low in savings(recipe, low):
        then = need(changed, with_low)
        if limits.refuse(then) is None:
            return Fit(refused, (words, then))
    return Fit(refused)


class Forecast:
    """A listener that says, once a run has its plan, what it will need: a line ``forecast`` with
    ram, vram, disk and nbytes (of all files of weights)."""

    def __init__(
        self, recipe: Recipe, source: Source, output: Path, lines: Iterable[Lines | Log]
    ) -> None:
        self._recipe, self._source, self._output = recipe, source, output
        self._lines = tuple(lines)
        self.needs: Needs | None = None

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        if isinstance(event, Planned):
            files = _total(planned_files(event.plan, self._recipe, self._output))
            accelerated = self._source.device.type != torch.empty(0).device.type
            self.needs = needs(
                event.plan, self._recipe, resident_bytes(), files=files,
                low_memory=self._source.low_cpu_mem_usage, accelerated=accelerated,
            )  # fmt: skip
            told = {"event": "forecast", "ram": self.needs.ram, "vram": self.needs.device,
                    "disk": self.needs.disk, "nbytes": files}  # fmt: skip
            for lines in self._lines:
                lines.say(told, ready=False)


def _kinds(plan: ModelPlan, dtype: torch.dtype, device: torch.device) -> Iterable[Kind]:
    contents, first = plan.contents, plan.targets[0]
    found: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    notes: dict[tuple[str, tuple[int, ...], str], str] = {}
    for key, tensor in contents.tensors.items():
        module = contents.modules.get(key)
        name = re.sub(r"\.\d+(?=\.|$)", ".*", key.removesuffix(".weight"))
        if len(tensor.shape) < 2:
            name, tensor = "norms, biases", replace(tensor, shape=())
        scheme = str(module.scheme) if module else tensor.dtype
        row = (name, module.shape if module else tensor.shape, scheme)
        found.setdefault(row, []).append(_nbytes(module, first) if module else tensor.nbytes)
        notes[row] = (
            _kernels(module, dtype, device)
            if module
            else plan.fates[key].removeprefix("copied").removeprefix(": ")
        )
    for row, sizes in found.items():
        name, shape, scheme = row
        yield Kind(name, len(sizes), shape, scheme, sum(sizes), notes[row])


def _nbytes(module: Module, target: Target) -> int:
    parts = target.packing.stored(module, target.contents).values()
    return sum(hal.Part(*part).nbytes for part in parts)


def _kernels(module: Module, dtype: torch.dtype, device: torch.device) -> str:
    """Kernels that will multiply few and many rows on this machine."""
    rows = hal.plan_kernels(module.spec, module.shape, dtype, device)
    return " / ".join(dict.fromkeys((rows[0][1].name, rows[-1][1].name)))
