# SPDX-License-Identifier: Apache-2.0
"""Packed layers of a checkpoint as its tensors show them, not as its config claims."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import hal
from autoround.errors import InputError
from hal import QTensor, Spec

#: ``packing_format`` in a config -> hal layout.
LAYOUT_OF = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_raw",
    "auto_round:gptqmodel": "gptq_raw",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """Where the packed tensors of every quantized module lie."""

    files: Mapping[str, str]
    layout: str
    group_sizes: Mapping[str, int]
    default_group: int

    @property
    def modules(self) -> list[str]:
        """Names of the packed modules, in the checkpoint's own naming."""
        return [k.removesuffix(".qweight") for k in self.files if k.endswith(".qweight")]

    def read(self, module: str) -> QTensor:
        """One module's weight in layout plain. Raises InputError where its tensors disagree."""
        parts = {}
        for part in PARTS:
            key = f"{module}.{part}"
            if key not in self.files:
                raise InputError(f"{module} has no {part} in the checkpoint; download it again")
            with safe_open(self.files[key], "pt") as file:
                parts[part] = file.get_tensor(key)
        return self._decode(module, parts)

    def _decode(self, module: str, parts: dict[str, Tensor]) -> QTensor:
        qweight, scales = parts["qweight"], parts["scales"]
        n = scales.shape[1]
        if self.layout == "awq":
            k, bits = qweight.shape[0], 32 * qweight.shape[1] // n
        else:
            bits = 32 * parts["qzeros"].shape[1] // n
            k = 32 * qweight.shape[0] // bits
        group = self._group(module, k, scales.shape[0])
        spec = Spec(f"u{bits}", 0 if group == k else group, "f16", "int")
        wide = {**parts, "scales": scales.to(torch.float16)}
        q = hal.pack(QTensor(spec, (n, k), self.layout, wide), "plain")
        return _symmetric(q)

    def _group(self, module: str, k: int, groups: int) -> int:
        """Columns of a group: the config's where the tensors agree with it, else what they show."""
        said = self.group_sizes.get(module, self.default_group)
        if said > 0 and -(-k // said) == groups:
            return said
        if k % groups:
            raise InputError(
                f"{module}: {groups} groups do not divide {k} columns; config is wrong"
            )
        return k // groups


def _symmetric(q: QTensor) -> QTensor:
    """Drop zero points that are all the middle level: the symmetric code needs none."""
    spec = Spec(f"s{q.spec.bits}", q.spec.group, q.spec.scale)
    if not (q.parts["zero"] == spec.half).all():
        return q
    return QTensor(spec, q.shape, "plain", {k: q.parts[k] for k in ("codes", "scale")})


def packed_files(paths: Iterable[str], config: Mapping[str, Any]) -> PackedFiles:
    """Survey shards by their headers. ``config``: the checkpoint's quantization config."""
    packing = str(config.get("packing_format", "auto_round:gptq"))
    if packing not in LAYOUT_OF:
        known = ", ".join(LAYOUT_OF)
        raise InputError(f"packing_format {packing!r} cannot be read yet; known: {known}")
    files: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), str(path))
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
    groups = {name: int(own["group_size"]) for name, own in extra.items() if own.get("group_size")}
    packed = {k: f for k, f in files.items() if k.rpartition(".")[2] in PARTS}
    return PackedFiles(packed, LAYOUT_OF[packing], groups, int(config.get("group_size", -1)))
