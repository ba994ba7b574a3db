# SPDX-License-Identifier: Apache-2.0
"""Packed modules as the weights of a model in memory: one, or several below each other."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from autoround.errors import InputError
from autoround.files import AGAIN
from autoround.formats import Quantized
from hal import QTensor, Spec


def read(files: Quantized, modules: Sequence[str], shape: tuple[int, int]) -> QTensor:
    """Modules stacked along N (one, the members of a fused weight, or all experts) to a weight
    ``[N, K]`` in layout plain. Raises InputError where they do not make that shape."""
    parts = [files.q(module) for module in modules]
    if {q.shape[1] for q in parts} != {shape[1]}:
        raise InputError(
            f"{files.path}: {modules[0]} is packed with {parts[0].shape[1]} columns, config.json "
            f"wants {shape[1]}; {AGAIN}"
        )
    if (n := sum(q.shape[0] for q in parts)) != shape[0]:
        raise InputError(
            f"{files.path}: {modules[0]} has {n} packed rows, config.json wants {shape[0]}; {AGAIN}"
        )
    if len(parts) == 1:
        return parts[0]
    if len({q.spec for q in parts}) > 1:
        parts = [_with_zeros(q) for q in parts]
    perms = [q.perm for q in parts if q.perm is not None]
    ordered = not perms or (
        len(perms) == len(parts) and all(torch.equal(perm, perms[0]) for perm in perms)
    )
    if len({q.spec for q in parts}) > 1 or not ordered:
        raise InputError(
            f"{files.path}: {modules[0]} and its siblings are packed differently; they need one "
            "scheme"
        )
    stacked = {part: torch.cat([q.parts[part] for q in parts]) for part in parts[0].parts}
    return QTensor(parts[0].spec, shape, "plain", stacked, perm=parts[0].perm)


def _with_zeros(q: QTensor) -> QTensor:
    """The same numbers with their zero levels written out."""
    if not q.spec.symmetric:
        return q
    zero = torch.full_like(q.parts["scale"], q.spec.half, dtype=torch.uint8)
    spec = Spec(f"u{q.spec.bits}", q.spec.group, q.spec.scale, "int")
    return replace(q, spec=spec, parts={**q.parts, "zero": zero})
