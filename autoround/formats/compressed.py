# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors, the format of llm-compressor (formats.md 4)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.row import Packing, Parts, Shapes, check, in_order, in_spec, scale_name
from autoround.scheme import Scheme
from hal import QTensor, Spec
from hal.layout import pack_stream, unpack_stream


def _refuse_packed(module: Module) -> str | None:
    n, k = module.shape
    if module.transposed:
        return "its readers know linear layers, not Conv1D"
    if n % 32 or k % 32:
        return f"[{n}, {k}] is not a multiple of 32 in both directions"
    if k % (module.spec.group or k):
        return f"{k} columns are not a multiple of group_size {module.scheme.group_size}"
    return None


def _refuse_bytes(module: Module) -> str | None:
    if module.spec.bits != 8 or not module.spec.symmetric:
        return f"holds 8 bits, symmetric, not {module.scheme}"
    if module.spec.group:
        return f"holds one scale a row (group_size -1), not group_size {module.scheme.group_size}"
    if module.act_order:
        return "columns in activation order"
    return _refuse_packed(module)


def _stored_packed(module: Module, contents: Contents | None) -> Shapes:
    (n, k), spec = module.shape, module.spec
    shapes: Shapes = {
        "weight_packed": (torch.int32, (n, k * spec.bits // 32)),
        "weight_scale": (spec.scale_dtype, (n, spec.groups(k))),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        shapes["weight_zero_point"] = (torch.int32, (n * spec.bits // 32, spec.groups(k)))
    if module.act_order:
        shapes["weight_g_idx"] = (torch.int32, (k,))
    return shapes


def _stored_bytes(module: Module, contents: Contents | None) -> Shapes:
    (n, k), spec = module.shape, module.spec
    return {
        "weight": (torch.int8, (n, k)),
        "weight_scale": (spec.scale_dtype, (n, spec.groups(k))),
    }


def _pack_packed(q: QTensor, module: Module, contents: Contents) -> Parts:
    natural, groups = in_order(q)
    parts = {
        "weight_packed": hal.pack(natural, "stream").parts["qweight"],
        "weight_scale": q.parts["scale"],
        "weight_shape": torch.tensor(q.shape),
    }
    if not q.spec.symmetric:
        parts["weight_zero_point"] = _t(pack_stream(_t(q.parts["zero"]), q.spec.bits))
    if module.act_order:
        parts["weight_g_idx"] = groups
    return parts


def _pack_bytes(q: QTensor, module: Module, contents: Contents) -> Parts:
    signed = (hal.pack(q, "plain").parts["codes"] ^ 0x80).view(torch.int8)  # level - 128
    return {"weight": signed, "weight_scale": q.parts["scale"]}


def read(parts: Parts) -> QTensor:
    """The plain weight of a module's tensors. Raises ValueError where they do not fit together."""
    scale, zero, g_idx = (
        parts.get(part) for part in ("weight_scale", "weight_zero_point", "weight_g_idx")
    )
    assert scale is not None
    codes = _bytes(parts["weight"]) if "weight" in parts else None
    n, k = (int(x) for x in parts["weight_shape"]) if codes is None else codes.shape
    groups = scale.shape[-1] if scale.ndim == 2 else 1
    bits = 8 if codes is not None else 32 * parts["weight_packed"].shape[1] // k
    if not groups or k % groups:
        raise ValueError(f"{groups} groups do not divide {k} columns")
    elem, kind = (f"s{bits}", "") if zero is None else (f"u{bits}", "int")
    spec = Spec(elem, 0 if groups == 1 else k // groups, scale_name(scale), kind)  # type: ignore[arg-type]
    module = Module("", "", spec, (n, k), act_order=g_idx is not None)
    plain: Parts = {"scale": scale.reshape(-1, groups)}
    wanted = (_stored_packed if codes is None else _stored_bytes)(module, None)
    if zero is not None and zero.dtype == torch.int8:  # before 0.10: one a byte, signed
        wanted["weight_zero_point"] = (torch.int8, (n, groups))
        plain["zero"] = (zero.to(torch.int16) + spec.half).to(torch.uint8)
    check({**parts, "weight_scale": plain["scale"]}, wanted, (n, k))
    if zero is not None and "zero" not in plain:
        plain["zero"] = _t(unpack_stream(_t(zero), bits))
    if codes is None:
        held = {"qweight": parts["weight_packed"], **plain}
        q = hal.pack(QTensor(spec, (n, k), "stream", held), "plain")
    else:
        q = QTensor(spec, (n, k), "plain", {"codes": codes, **plain})
    return q if g_idx is None else q.ordered(g_idx.int())


def _bytes(weight: Tensor) -> Tensor:
    if weight.dtype != torch.int8:
        raise ValueError(f"codes in {weight.dtype}")
    return weight.view(torch.uint8) ^ 0x80


def _t(x: Tensor) -> Tensor:
    return x.t().contiguous()


def _read(module: Module, parts: Parts) -> QTensor:
    return in_spec(read(parts), module.spec)


PACKED = Packing(
    "pack-quantized", _refuse_packed, _stored_packed, _pack_packed, read=_read,
    scales="weight_scale",
)  # fmt: skip
BYTES = Packing(
    "int-quantized", _refuse_bytes, _stored_bytes, _pack_bytes, read=_read, scales="weight_scale"
)


#: Engines multiply int-quantized weights with activations in 8 bits, a scale per token, only.
ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def compressed_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """A group for every scheme: its layers by class where it is the only one, else by their names.

    SGLang asks for the class before it looks for the parts of a fused layer, so a group by class
    would take layers from groups by name; vLLM's lm_head is of another class. Every matrix that
    stays is in ``ignore``: one that is missing there is read as quantized, with random scales.
    """
    groups: dict[tuple[Scheme, bool], list[str]] = {}
    for module in contents.modules.values():
        groups.setdefault((module.scheme, module.act_order), []).append(module.name)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    single = len(ordered) == 1
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": packing.name,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": contents.kept_matrices,
            "config_groups": {
                f"group_{i}": _group(key, packing, ["Linear", *contents.heads] if single else names)
                for i, (key, names) in enumerate(ordered)
            },
        }
    }


def _group(key: tuple[Scheme, bool], packing: Packing, targets: Iterable[str]) -> dict[str, Any]:
    scheme, act_order = key
    whole_row = scheme.group_size == -1
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }
    if act_order:
        weights["actorder"] = "group"
    return {
        "targets": list(targets),
        "format": packing.name,
        "weights": weights,
        "input_activations": ACTIVATIONS if packing is BYTES else None,
        "output_activations": None,
    }
