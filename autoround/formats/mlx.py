# SPDX-License-Identifier: Apache-2.0
"""MLX: ``scales * code + biases``, in the dtype of the whole model (formats.md 5)."""

import re
from collections.abc import Mapping
from typing import Any

import torch

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.row import Packing, Parts, Place, Shapes, check, scale_name
from autoround.formats.sink import DTYPES, FLOATS
from autoround.scheme import KEEP_BITS, Scheme
from autoround.stacks import kind_of
from hal import QTensor, Spec

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
#: Experts as checkpoints name them -> as mlx-lm's stacked layers are called.
EXPERT = re.compile(r"^(.*)\.experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\b(.*)$")
ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
#: Families whose checkpoints call them by the short names.
SHORT = ("mixtral", "phimoe", "granitemoe", "granitemoeshared", "granitemoehybrid")
ELSEWHERE = ("gpt_oss", "llama4", "gemma4")
#: Families whose activations leave the range of f16.
WIDE = ("gemma",)


def _refuse(module: Module) -> str | None:
    k = module.shape[1]
    if module.spec.bits not in BITS:
        return f"holds {', '.join(map(str, BITS))} bits, not {module.spec.bits}"
    if module.spec.group not in GROUPS:
        return f"group_size {module.scheme.group_size}: holds 32, 64 and 128"
    if module.act_order:
        return "columns in activation order"
    if module.transposed:
        return "its readers know linear layers, not Conv1D"
    return (
        f"{k} columns are not a multiple of group_size {module.spec.group}"
        if (k % module.spec.group)
        else None
    )


def dtype_of(contents: Contents) -> torch.dtype:
    """What the model is written in: MLX computes in the dtype of the scales.

    f16 holds our scales exactly, and bf16 tensors but for the smallest; bf16 where activations need
    its range, at the price of rounding scales; f32 models stay f32.
    """
    if any(t.dtype == "F32" and len(t.shape) > 1 for t in contents.tensors.values()):
        return torch.float32
    family = str(contents.config.get("model_type", ""))
    return torch.bfloat16 if family.startswith(WIDE) else torch.float16


def _stored(module: Module, contents: Contents) -> Shapes:
    (n, k), spec, dtype = module.shape, module.spec, dtype_of(contents)
    return {
        "weight": (torch.uint32, (n, k * spec.bits // 32)),
        "scales": (dtype, (n, spec.groups(k))),
        "biases": (dtype, (n, spec.groups(k))),
    }


def _pack(q: QTensor, module: Module, contents: Contents) -> Parts:
    dtype, scale = dtype_of(contents), q.parts["scale"].float()
    zero = q.parts["zero"] if "zero" in q.parts else torch.tensor(q.spec.half)
    return {
        "weight": hal.pack(q, "stream").parts["qweight"].view(torch.uint32),
        "scales": scale.to(dtype),
        "biases": (-scale * zero).to(dtype),
    }


def _loss(q: QTensor, parts: Parts) -> float:
    """Largest |scales * code + biases - scale * (code - zero)|: at one end of the codes."""
    scale = q.parts["scale"].float()
    zero = (q.parts["zero"] if "zero" in q.parts else torch.tensor(q.spec.half)).float()
    scales, biases = parts["scales"].float(), parts["biases"].float()
    ends = [scales * c + biases - scale * (c - zero) for c in (0.0, float(q.spec.max_level))]
    return max(float(e.abs().max()) for e in ends) if scale.numel() else 0.0


def read(parts: Parts, group: int) -> QTensor:
    """The plain weight of a module's tensors: the zero level is -biases / scales.

    Raises ValueError where that is no level: such a group has no integer zero point.
    """
    scales, biases = parts["scales"], parts["biases"]
    n, groups = scales.shape
    k = groups * group
    bits = 32 * parts["weight"].shape[1] // k
    levels = -biases.float() / scales.float()
    zero = levels.round()
    # A bias is rounded to its dtype; more than that apart, it is no multiple of the scale.
    slack = levels.abs() * 2 * torch.finfo(biases.dtype).eps + 1e-6
    if bool(((levels - zero).abs() > slack).any()) or not bool(
        ((zero >= 0) & (zero < 2**bits)).all()
    ):
        raise ValueError("a bias is no level times its scale: the group has no integer zero point")
    spec = Spec(f"u{bits}", group, scale_name(scales), "int")
    words = (torch.uint32, (n, k * bits // 32))
    check(parts, {"weight": words, "biases": (scales.dtype, (n, groups))}, (n, k))
    held = {"qweight": parts["weight"].view(torch.int32), "scale": scales}
    held["zero"] = zero.to(torch.uint8)
    return hal.pack(QTensor(spec, (n, k), "stream", held), "plain")


AFFINE = Packing("mlx", _refuse, _stored, _pack, _loss)


def place(name: str) -> Place:
    """Experts lie in one tensor, expert after expert."""
    if match := EXPERT.match(name):
        where, index, role, rest = match.groups()
        return Place(f"{where}.switch_mlp.{ROLES.get(role, role)}{rest}", int(index))
    return Place(name)


def refuse(contents: Contents) -> str | None:
    """Families whose experts mlx-lm (0.32) has elsewhere than in a ``switch_mlp``."""
    kind = kind_of(contents.config)
    if kind.startswith(ELSEWHERE) and any(EXPERT.match(m.name) for m in contents.modules.values()):
        return f"mlx-lm has the experts of {kind} under names that are not written yet"
    return None


def expert_names(prefix: str, count: int, model_type: str) -> list[str]:
    """The inverse of `place`: modules that the layer ``...switch_mlp.<role>`` is made of."""
    where, _, role = prefix.rpartition(".")
    if model_type in SHORT:
        role = next((short for short, long in ROLES.items() if long == role), role)
    experts = where.removesuffix(".switch_mlp") + ".experts"
    return [f"{experts}.{e}.{role}" for e in range(count)]


def cast(dtype: str, contents: Contents) -> str:
    """Floats in the one dtype of the model."""
    return DTYPES[dtype_of(contents)] if dtype in FLOATS else dtype


def mlx_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """mlx-lm's ``quantization``, twice: its readers look in either place."""
    settings = _settings(contents)
    name = str(dtype_of(contents)).removeprefix("torch.")
    own = {"quantization": settings, "quantization_config": settings, "torch_dtype": name}
    return {**_as_published(contents.config), **own}


def _as_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that transformers 5 renamed, by the names mlx-lm looks for: it takes defaults for what
    it does not find (a rope_theta of its own: logits of a qwen2 were 1.1 off)."""
    own: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        own["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            own["rope_scaling"] = {key: v for key, v in rope.items() if key != "rope_theta"}
    if "num_local_experts" in config:
        own["num_experts"] = config["num_local_experts"]
    return {key: value for key, value in own.items() if key not in config}


def auto_round_mlx_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """The same files with a ``quantization_config`` that says whose they are."""
    base = contents.base
    own = {
        "quant_method": "auto-round",
        "packing_format": packing.name,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "data_type": "int",
    }
    return {**mlx_config(contents, packing), "quantization_config": own}


def _settings(contents: Contents) -> dict[str, Any]:
    base = contents.base
    settings: dict[str, Any] = {
        "group_size": base.group_size,
        "bits": base.bits,
        "mode": "affine",
    }
    quantized = {place(m.name).name for m in contents.modules.values()}
    settings |= dict.fromkeys((n for n in contents.kept_matrices if n not in quantized), False)
    for name, scheme in contents.schemes.items():
        if scheme.bits != KEEP_BITS and _differs(scheme, base):
            settings[place(name).name] = {"group_size": scheme.group_size, "bits": scheme.bits}
    return settings


def _differs(scheme: Scheme, base: Scheme) -> bool:
    return (scheme.bits, scheme.group_size) != (base.bits, base.group_size)
