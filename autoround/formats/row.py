# SPDX-License-Identifier: Apache-2.0
"""The types of the format tables: a packing stores one weight, a format one model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoround.formats.contents import Contents, Module
from hal import QTensor, Spec
from hal.spec import SCALES

#: Elements compared at once.
PIECE = 1 << 22
Parts = dict[str, Tensor]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def check(parts: Mapping[str, Tensor], wanted: Shapes, shape: tuple[int, int]) -> None:
    """ValueError where a tensor has not the dtype and shape that a weight of ``shape`` needs."""
    for name, (dtype, size) in wanted.items():
        if (parts[name].dtype, tuple(parts[name].shape)) != (dtype, size):
            raise ValueError(
                f"{name} is {parts[name].dtype} {list(parts[name].shape)}, not {dtype} "
                f"{list(size)} as its {list(shape)} weight needs"
            )


def scale_name(scale: Tensor) -> str:
    """The name a spec has for the dtype of these scales. ValueError where it has none."""
    for name, dtype in SCALES.items():
        if dtype == scale.dtype:
            return name
    raise ValueError(f"scales in {scale.dtype}")


def in_order(q: QTensor) -> tuple[QTensor, Tensor]:
    """Codes in the matrix's own order of columns, and every column's group, i32 [K]."""
    k = q.shape[1]
    groups = torch.arange(k, dtype=torch.int32) // q.spec.width(k)
    if q.perm is None:
        return q, groups
    back = q.perm.argsort()
    codes = q.parts["codes"][:, back].contiguous()
    return replace(q, parts={**q.parts, "codes": codes}, perm=None), groups[back]


def in_spec(q: QTensor, spec: Spec) -> QTensor:
    """A plain weight as a spec says the same: its dtype of scales, zero levels or none (all are the
    middle then). ValueError where it cannot."""
    k, parts = q.shape[1], dict(q.parts)
    if (q.spec.bits, q.spec.width(k)) != (spec.bits, spec.width(k)):
        raise ValueError(f"{q.spec}, where {spec} is expected")
    parts["scale"] = q.parts["scale"].to(spec.scale_dtype)
    if not torch.equal(parts["scale"].to(q.parts["scale"].dtype), q.parts["scale"]):
        raise ValueError(f"scales that {spec.scale} does not hold")
    if not spec.symmetric and "zero" not in parts:
        parts["zero"] = torch.full(parts["scale"].shape, spec.half, dtype=torch.uint8)
    elif spec.symmetric and "zero" in parts and bool((parts.pop("zero") != spec.half).any()):
        raise ValueError(f"zero levels other than {spec.half} in a symmetric {spec}")
    return replace(q, spec=spec, parts=parts)


def furthest(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| of two float tensors of one shape, a piece at a time."""
    pieces = zip(*(torch.split(t.reshape(-1), PIECE) for t in (a, b)), strict=True)
    ends = (torch.aminmax(x.float() - y.float()) for x, y in pieces)
    return max((max(-float(low), float(high)) for low, high in ends), default=0.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: under a name of its own, or as one of several that lie in one."""

    name: str
    index: int | None = None


def as_named(name: str) -> Place:
    """Every tensor under its own name."""
    return Place(name)


def as_stored(dtype: str, contents: Contents) -> str:
    """Kept tensors byte for byte."""
    return dtype


def any_model(contents: Contents) -> str | None:
    """No objection."""
    return None


@dataclass(frozen=True, slots=True)
class Packing:
    """How one kind of file stores one quantized weight.

    ``refuse(module)``: why it cannot, or None. ``stored(module, contents)``: suffix -> dtype and
    shape, and ``pack(q, module, contents)``: the tensors themselves; ``q`` is plain or, without a
    ``perm``, a stream (`hal.layout`), its columns in the matrix's order unless ``act_order`` (then
    ``q.perm`` tells). ``loss(q, parts)``: largest difference between ``q`` dequantized and what a
    reader makes of the parts; None = always 0.
    ``read(module, parts)``: the plain weight again, as it was given to ``pack``; None where
    something is lost. ``scales``: suffix of the tensor that alone changes with the scales.
    """

    name: str
    refuse: Callable[[Module], str | None]
    stored: Callable[[Module, Contents], Shapes]
    pack: Callable[[QTensor, Module, Contents], Parts]
    loss: Callable[[QTensor, Parts], float] | None = None
    read: Callable[[Module, Parts], QTensor] | None = None
    scales: str = "scales"


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of model directory.

    ``packings``, best first: the first that holds every layer serves. ``config(contents,
    packing)``: what config.json gets beside the source's own keys; ``torch_dtype`` there sets the
    dtype at every level. ``uniform``: its readers know one scheme and 16 bits. ``place``: names,
    where not the checkpoint's; ``cast``: safetensors dtype that kept tensors are written in;
    ``metadata``: of the safetensors header. ``refuse``: why it cannot hold a model, whatever its
    layers, or None. ``files``: copies of ``quantization_config`` that
    readers look for.
    """

    name: str
    about: str
    packings: tuple[Packing, ...]
    config: Callable[[Contents, Packing], dict[str, Any]]
    place: Callable[[str], Place] = as_named
    cast: Callable[[str, Contents], str] = as_stored
    metadata: str = "pt"
    refuse: Callable[[Contents], str | None] = any_model
    files: tuple[str, ...] = ()
    uniform: bool = False
