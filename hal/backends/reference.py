# SPDX-License-Identifier: Apache-2.0
"""Every verb in plain torch, for any device: the truth other kernels are compared with."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hal import block, codec
from hal import layout as file_layouts
from hal.layout import Layout, Parts
from hal.plan import Weight
from hal.qtensor import Params
from hal.registry import Caps, Kernel, described
from hal.spec import Spec

NAME = "reference"
KINDS: dict[str, str] = {}
LAYOUTS: tuple[Layout, ...] = ()


def probe() -> str | None:
    return None


def caps(device: torch.device) -> Caps:
    return described(device)


def block_ops() -> block.BlockOps:
    return block.BlockOps(block.norm, block.gate, block.attend)


def probes() -> None:
    return None


def _search(
    w: Tensor, spec: Spec, importance: Tensor | None, grid: int, amin: Tensor, amax: Tensor
) -> None:
    for out, value in zip((amin, amax), codec.search(w, spec, importance, grid), strict=True):
        out.copy_(value)


def _qdq(w: Tensor, p: Params, spec: Spec, out: Tensor) -> None:
    out.copy_(codec.qdq(w, p, spec))


def _quantize(w: Tensor, p: Params, spec: Spec, parts: Parts) -> None:
    q, _, scale, zero = codec.levels(w, p, spec)
    parts["codes"].copy_(codec.ungrouped(q, w.shape[1]))
    parts["scale"].copy_(scale)
    if not spec.symmetric:
        parts["zero"].copy_(zero)


def _round(w: Tensor, spec: Spec, layout: str) -> Parts:
    """In steps, each by the best kernel for it."""
    from hal import ops

    return ops.quantize(w, ops.search(w, spec), spec, layout=layout).parts


def _dequantize(parts: Parts, spec: Spec, out: Tensor) -> None:
    out.copy_(codec.decode(parts["codes"], parts["scale"], parts.get("zero"), spec))


def _pack(parts: Parts, spec: Spec, shape: tuple[int, int], layout: str) -> Parts:
    return file_layouts.LAYOUTS[layout].pack(parts, spec)


def _unpack(parts: Parts, spec: Spec, shape: tuple[int, int], layout: str) -> Parts:
    return file_layouts.LAYOUTS[layout].unpack(parts, spec, shape)


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    parts = weight.parts
    w = codec.decode(parts["codes"], parts["scale"], parts.get("zero"), weight.spec)
    out.copy_(F.linear(x.float(), w, None if bias is None else bias.float()))


def _qgemm_grouped(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    parts = weight.parts
    rows = weight.shape[0] // weight.experts
    ends = offsets.tolist()
    for e in range(weight.experts):
        if ends[e] < ends[e + 1]:
            own = {name: t[e * rows : (e + 1) * rows] for name, t in parts.items()}
            w = codec.decode(own["codes"], own["scale"], own.get("zero"), weight.spec)
            out[ends[e] : ends[e + 1]] = F.linear(x[ends[e] : ends[e + 1]].float(), w).to(out.dtype)


def _quantize_act(x: Tensor, group: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return codec.quantize_act(x, group, scale)


def _hadamard(x: Tensor, block: int) -> None:
    x.copy_(codec.hadamard(x, block))


KERNELS = (
    Kernel("reference.search", "search", _search),
    Kernel("reference.qdq", "qdq", _qdq),
    Kernel("reference.qdq_step", "qdq_step", codec.qdq_step_),
    Kernel("reference.quantize", "quantize", _quantize),
    Kernel("reference.round", "round", _round),
    Kernel("reference.dequantize", "dequantize", _dequantize),
    Kernel("reference.pack", "pack", _pack),
    Kernel("reference.unpack", "unpack", _unpack),
    Kernel("reference.quantize_act", "quantize_act", _quantize_act),
    Kernel("reference.hadamard", "hadamard", _hadamard),
    Kernel("reference.qgemm", "qgemm", _qgemm),
    Kernel("reference.qgemm_grouped", "qgemm_grouped", _qgemm_grouped),
)
