# SPDX-License-Identifier: Apache-2.0
"""AWQ's gemm words: four bits, eight output columns in a word (formats.md 3)."""

import re
from typing import Any

import torch

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.engines import as_built
from autoround.formats.gptq import group_of, whole
from autoround.formats.row import Packing, Parts, Shapes, check, in_spec, scale_name
from autoround.scheme import KEEP_BITS
from hal import QTensor, Spec


def _refuse(module: Module) -> str | None:
    if module.spec.bits != 4:
        return f"holds 4 bits, not {module.spec.bits}"
    if module.act_order:
        return "columns in activation order"
    return whole(module)


def _refuse_gemm(module: Module) -> str | None:
    if module.transposed:
        return "its readers know linear layers, not Conv1D"
    return _refuse(module)


def _stored(module: Module, contents: Contents | None) -> Shapes:
    n, k = module.shape
    groups = module.spec.groups(k)
    return {
        "qweight": (torch.int32, (k, n // 8)),
        "qzeros": (torch.int32, (groups, n // 8)),
        "scales": (torch.float16, (groups, n)),
    }


def _pack(q: QTensor, module: Module, contents: Contents) -> Parts:
    return hal.pack(q, "awq").parts


def read(parts: Parts, said: int) -> QTensor:
    """The plain weight of a module's tensors; ``said``: the group that the config gives it.

    Raises ValueError where they do not fit together.
    """
    scales = parts["scales"]
    k, n = parts["qweight"].shape[0], 8 * parts["qweight"].shape[1]
    groups = scales.shape[0]
    group = group_of(k, groups, said)
    spec = Spec("u4", 0 if groups == 1 else group, scale_name(scales), "int")
    shapes = _stored(Module("", "", spec, (n, k)), None)
    check(parts, {**shapes, "scales": (scales.dtype, (groups, n))}, (n, k))
    return hal.pack(QTensor(spec, (n, k), "awq", dict(parts)), "plain")


def _read(module: Module, parts: Parts) -> QTensor:
    return in_spec(read(parts, module.spec.group), module.spec)


AUTO_AWQ = Packing("auto_round:auto_awq", _refuse, _stored, _pack, read=_read)
GEMM = Packing("gemm", _refuse_gemm, _stored, _pack, read=_read)


def awq_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """One scheme; what is kept by its full name, for readers look for it anywhere in a name.

    ``zero_point`` is always true: the zero levels are in the files, and readers that are told
    otherwise pass over them. ``dynamic`` says again what is kept, for GPTQModel, which passes over
    the list; ``lm_head`` is for vLLM.
    """
    named = as_built(contents.schemes)
    kept = [name for name, scheme in named.items() if scheme.bits == KEEP_BITS]
    head = [] if contents.heads else ["lm_head"]
    return {
        "quantization_config": {
            "quant_method": "awq",
            "version": packing.name,
            "bits": 4,
            "group_size": contents.base.group_size,
            "zero_point": True,
            "lm_head": bool(contents.heads),
            "modules_to_not_convert": [*head, *kept],
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept},
        }
    }
