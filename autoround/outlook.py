# SPDX-License-Identifier: Apache-2.0
"""What a run would do, from headers alone: every weight's fate, every file's size, the kernels."""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import hal
from autoround import stream
from autoround.artefact import places
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.formats import Module, Target
from autoround.formats.sink import file_sizes
from autoround.models import StreamedModel, survey_of
from autoround.models.survey import by_names
from autoround.plan import ModelPlan, make_plan
from autoround.recipe import Recipe, shard_bytes
from autoround.run import Source


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
class Outlook:
    """``files``: directory -> name and bytes of each file of weights, exactly as they will be.
    ``free``: bytes of the disk that the output goes to."""

    plan: ModelPlan
    kinds: tuple[Kind, ...]
    files: dict[Path, dict[str, int]]
    free: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(sum(sizes.values()) for sizes in self.files.values())


def outlook(recipe: Recipe, source: Source, output: Path) -> Outlook:
    """Decide everything that headers decide. Raises InputError for what a run would refuse."""
    checkpoint = Checkpoint(resolve(str(source.model)))
    if stream.refuse(recipe, checkpoint) is None:
        survey, dtype = by_names(checkpoint), torch.bfloat16
    else:
        streamed = StreamedModel(
            checkpoint, device=source.device, trust_remote_code=source.trust_remote_code
        )
        survey, dtype = survey_of(streamed), streamed.dtype
    plan = make_plan(survey, recipe)
    size = shard_bytes(recipe.max_shard_size)
    files = {
        place: file_sizes(target.stored, size, target.format.metadata)
        for place, target in zip(places(plan.written, output), plan.written, strict=True)
    }
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    found = Outlook(plan, tuple(_kinds(plan, dtype, source.device)), files, free)
    if found.nbytes > free:
        raise InputError(
            f"{parent} has {free / 1e9:.2f} GB free, the run writes {found.nbytes / 1e9:.2f} GB; "
            "choose another -o, or fewer formats"
        )
    return found


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
