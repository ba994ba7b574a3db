# SPDX-License-Identifier: Apache-2.0
"""Packed layers of a checkpoint as its tensors show them, not as its config claims."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import hal
from autoround.errors import InputError
from autoround.formats import stored_parts
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

    def read(self, modules: Sequence[str], shape: tuple[int, int]) -> QTensor:
        """Modules stacked along N (one, the members of a fused weight, or all experts) to a weight
        ``[N, K]`` in layout plain. Raises InputError where they do not make that shape."""
        read = [self._one(module, shape[1]) for module in modules]
        if len({q.spec for q in read}) > 1:
            raise InputError(
                f"{modules[0]} and its siblings are packed differently; they need one scheme"
            )
        if (n := sum(q.shape[0] for q in read)) != shape[0]:
            raise InputError(
                f"{modules[0]}: {n} packed rows for a weight of {shape[0]}; download it again"
            )
        if len(read) == 1:
            return _symmetric(read[0])
        parts = {part: torch.cat([q.parts[part] for q in read]) for part in read[0].parts}
        return _symmetric(QTensor(read[0].spec, shape, "plain", parts))

    def _one(self, module: str, k: int) -> QTensor:
        parts = {part: self._tensor(module, part) for part in PARTS}
        q = self._as_stored(module, parts, k)
        self._check_order(module, q)
        return hal.pack(q, "plain")

    def _tensor(self, module: str, part: str) -> Tensor:
        key = f"{module}.{part}"
        if key not in self.files:
            raise InputError(f"{module} has no {part} in the checkpoint; download it again")
        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def _as_stored(self, module: str, parts: dict[str, Tensor], k: int) -> QTensor:
        """The tensors with the spec that their shapes show, checked against it."""
        scales = parts["scales"].to(torch.float16)
        n = scales.shape[-1]
        bits = 4 if self.layout == "awq" else 32 * parts["qzeros"].shape[-1] // n
        if bits not in range(2, 9):
            raise InputError(f"{module}: its tensors show {bits} bits; download it again")
        group = self._group(module, k, scales.shape[0])
        spec = Spec(f"u{bits}", 0 if group == k else group, "f16", "int")
        shown = Spec(f"s{bits}", spec.group)  # stored alike, and every layout holds it
        if reason := hal.refuse(shown, (n, k), self.layout):
            raise InputError(f"{module} cannot be read: {reason}; download it again")
        wanted = dict(stored_parts(shown, n, k, self.layout))
        for part, tensor in {**parts, "scales": scales}.items():
            if wanted[part] != (tensor.dtype, tuple(tensor.shape)):
                raise InputError(
                    f"{module}.{part} is {tensor.dtype} {list(tensor.shape)}, not "
                    f"{list(wanted[part].shape)} as its [{n}, {k}] weight needs; download it again"
                )
        return QTensor(spec, (n, k), self.layout, {**parts, "scales": scales})

    def _check_order(self, module: str, q: QTensor) -> None:
        """Columns must belong to groups in order: a permuted ``g_idx`` (act-order) is refused."""
        if f"{module}.g_idx" not in self.files:
            return
        k = q.shape[1]
        if not torch.equal(
            self._tensor(module, "g_idx").long(), torch.arange(k) // q.spec.width(k)
        ):
            raise InputError(f"{module}: columns in activation order (g_idx) are not supported yet")

    def _group(self, module: str, k: int, groups: int) -> int:
        """Columns of a group: the config's where the tensors agree with it, else what they show."""
        said = self.group_sizes.get(module, self.default_group)
        if said > 0 and -(-k // said) == groups:
            return said
        if not groups or k % groups:
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
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), str(path))
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); download it again") from None
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
    groups = {name: int(own["group_size"]) for name, own in extra.items() if own.get("group_size")}
    packed = {k: f for k, f in files.items() if k.rpartition(".")[2] in (*PARTS, "g_idx")}
    return PackedFiles(packed, LAYOUT_OF[packing], groups, int(config.get("group_size", -1)))
