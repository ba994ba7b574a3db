# SPDX-License-Identifier: Apache-2.0
"""GPTQ words: `auto_round` and its sub-formats, `auto_gptq` in both versions (formats.md 1, 2).

Codes are a stream along K of every output column. A zero level is stored minus one (version 1, and
``auto_round:auto_gptq``) or as it is (version 2, and the others).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.engines import as_built
from autoround.formats.row import Packing, Parts, Shapes, check, in_order, in_spec, scale_name
from autoround.scheme import KEEP_BITS, Scheme
from hal import QTensor, Spec

#: Bits that GPTQ's own readers know; `auto_round` has the rest too.
GPTQ_BITS = (2, 3, 4, 8)


def whole(module: Module) -> str | None:
    """Why integer words cannot hold the shape, or None."""
    n, k = module.shape
    if n % 32 or k % 32:
        return f"[{n}, {k}] is not a multiple of 32 in both directions"
    if k % module.spec.width(k):
        # Readers of these files either refuse a short last group or drop the layer silently.
        return f"{k} columns are not a multiple of group_size {module.scheme.group_size}"
    if module.spec.scale != "f16":
        return f"scales in {module.spec.scale} that f16 does not hold"
    return None


def _refuse(minus_one: bool, bits: tuple[int, ...], ordered: bool) -> Callable[[Module], Any]:
    def refuse(module: Module) -> str | None:
        if module.spec.bits not in bits:
            return f"holds {', '.join(map(str, bits))} bits, not {module.spec.bits}"
        if minus_one and not module.spec.symmetric and module.least_zero < 1:
            return "a zero level of 0 cannot be stored as zero - 1"
        if module.act_order and not ordered:
            return "columns in activation order"
        return whole(module)

    return refuse


def _stored(g_idx: bool) -> Callable[[Module, Contents | None], Shapes]:
    def stored(module: Module, contents: Contents | None) -> Shapes:
        n, k = module.shape
        bits, groups = module.spec.bits, module.spec.groups(k)
        shapes: Shapes = {
            "qweight": (torch.int32, (k * bits // 32, n)),
            "qzeros": (torch.int32, (groups, n * bits // 32)),
            "scales": (torch.float16, (groups, n)),
        }
        return {**shapes, "g_idx": (torch.int32, (k,))} if g_idx else shapes

    return stored


def _pack(minus_one: bool, g_idx: bool) -> Callable[[QTensor, Module, Contents], Parts]:
    def pack(q: QTensor, module: Module, contents: Contents) -> Parts:
        natural, groups = in_order(q)
        parts = hal.pack(natural, "gptq" if minus_one and q.spec.symmetric else "gptq_raw").parts
        if minus_one and not q.spec.symmetric:
            less = replace(natural, parts={**natural.parts, "zero": natural.parts["zero"] - 1})
            parts["qzeros"] = hal.pack(less, "gptq_raw").parts["qzeros"]
        return {**parts, "g_idx": groups} if g_idx else parts

    return pack


def _read(minus_one: bool) -> Callable[[Module, Parts], QTensor]:
    return lambda module, parts: in_spec(read(parts, minus_one, module.spec.group), module.spec)


def read(parts: Parts, minus_one: bool, said: int) -> QTensor:
    """The plain weight of a module's tensors; ``said``: the group that the config gives it.

    Raises ValueError where they do not fit together.
    """
    scales, g_idx = parts["scales"], parts.get("g_idx")
    groups, n = scales.shape
    bits = 32 * parts["qzeros"].shape[1] // n
    k = 32 * parts["qweight"].shape[0] // bits
    group = group_of(k, groups, said)
    spec = Spec(f"u{bits}", 0 if groups == 1 else group, scale_name(scales), "int")
    shapes = _stored(g_idx is not None)(Module("", "", spec, (n, k)), None)
    check(parts, {**shapes, "scales": (scales.dtype, (groups, n))}, (n, k))
    held = {"qweight": parts["qweight"], "qzeros": parts["qzeros"], "scales": scales}
    q = hal.pack(QTensor(spec, (n, k), "gptq_raw", held), "plain")
    if minus_one:
        q.parts["zero"] = q.parts["zero"] + 1
    if g_idx is None or torch.equal(g_idx.long(), torch.arange(k) // spec.width(k)):
        return q
    return q.ordered(g_idx.int())


def group_of(k: int, groups: int, said: int) -> int:
    """Columns of a group: the config's where the tensors agree with it, else what they show."""
    if said > 0 and -(-k // said) == groups:
        return said
    if not groups or k % groups:
        raise ValueError(f"{groups} groups do not divide {k} columns; its config is wrong")
    return k // groups


AUTO_GPTQ = Packing(
    "auto_round:auto_gptq", _refuse(True, tuple(range(2, 9)), False), _stored(False),
    _pack(True, False), read=_read(True),
)  # fmt: skip
#: What `auto_round` picks of it: asymmetric, neither vLLM nor SGLang nor auto-round's CPU kernels
#: read it.
SYMMETRIC = replace(
    AUTO_GPTQ,
    refuse=lambda module: (
        AUTO_GPTQ.refuse(module) if module.spec.symmetric else "asymmetric: packed otherwise"
    ),
)
RAW = Packing(
    "auto_round", _refuse(False, tuple(range(2, 9)), False), _stored(False), _pack(False, False),
    read=_read(False),
)  # fmt: skip
GPTQMODEL = Packing(
    "auto_round:gptqmodel", _refuse(False, tuple(range(2, 9)), False), _stored(True),
    _pack(False, True), read=_read(False),
)  # fmt: skip
V1 = Packing(
    "gptq", _refuse(True, GPTQ_BITS, True), _stored(True), _pack(True, True), read=_read(True)
)
V2 = Packing(
    "gptq_v2", _refuse(False, GPTQ_BITS, True), _stored(True), _pack(False, True),
    read=_read(False),
)  # fmt: skip


def auto_round_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """The base scheme, and layers that differ by their exact names."""
    base = contents.base
    same = _fields(base)
    extra: dict[str, dict[str, Any]] = {}
    for name, scheme in as_built(contents.schemes).items():
        if scheme.bits == KEEP_BITS:
            extra[name] = {"bits": KEEP_BITS, "data_type": "float"}
        elif not contents.inside(name):
            extra[name] = {**_fields(scheme), "data_type": "int"}
        elif differs := {k: v for k, v in _fields(scheme).items() if v != same[k]}:
            extra[name] = differs
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packing.name,
        **same,
        "data_type": "int",
        "block_name_to_quantize": contents.blocks,
    }
    return {"quantization_config": {**config, "extra_config": extra} if extra else config}


def gptq_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """GPTQ's own, with GPTQModel's ``dynamic`` for layers that differ or are kept."""
    base = contents.base
    dynamic: dict[str, dict[str, Any]] = {}
    for name, scheme in as_built(contents.schemes).items():
        pattern = f"^{re.escape(name)}$"
        if scheme.bits == KEEP_BITS:
            dynamic[f"-:{pattern}"] = {}
        elif scheme != base:
            dynamic[f"+:{pattern}"] = _fields(scheme)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **_fields(base),
        "desc_act": any(module.act_order for module in contents.modules.values()),
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": bool(contents.heads),
        "checkpoint_format": packing.name,
        "provider": "autoround",
    }
    if dynamic:
        config["dynamic"] = dynamic
    if suffixes := _always(contents):
        config["modules_in_block_to_quantize"] = [suffixes]
    return {"quantization_config": config}


def _always(contents: Contents) -> list[str]:
    """Names inside a block that are quantized wherever they occur, if some others never are."""
    quantized = {_suffix(contents, m.name) for m in contents.modules.values()} - {""}
    kept = [n for n, s in contents.schemes.items() if s.bits == KEEP_BITS]
    skipped = {_suffix(contents, name) for name in kept} - {""}
    return sorted(quantized) if skipped and not quantized & skipped else []


def _suffix(contents: Contents, name: str) -> str:
    inside = name.removeprefix(contents.blocks + ".")
    return inside.partition(".")[2] if inside != name else ""


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
