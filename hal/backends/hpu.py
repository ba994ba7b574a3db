# SPDX-License-Identifier: Apache-2.0
"""Gaudi: 4 bits through its own decoding operator, which the graph compiler fuses with the product;
everything else through torch. Not run on hardware: tested with a double of the operator."""

import importlib.util

import torch
from torch import Tensor

from hal.backends import reference
from hal.layout import Layout, Parts, pack_stream, unpack_stream
from hal.plan import Weight
from hal.registry import WRITTEN, Case, Kernel
from hal.spec import Spec

NAME = "hpu"
KINDS = {NAME: WRITTEN}


def probe() -> str | None:
    if importlib.util.find_spec("habana_frameworks") is None:
        return "habana_frameworks is not installed: use Habana's own containers"
    return None


#: What torch tells of the device, and torch's own operations between products.
caps, block_ops, probes = reference.caps, reference.block_ops, reference.probes


# ---- the weight as `hpu::convert_from_uint4` takes it: packed along N, lowest nibble first


def _pack(parts: Parts, spec: Spec) -> Parts:
    scale = parts["scale"].t().contiguous()
    zero = parts.get("zero", torch.full_like(parts["scale"], spec.half, dtype=torch.uint8))
    return {
        "codes": pack_stream(parts["codes"].t().contiguous(), 4),
        "scale": scale,
        "zero": pack_stream(zero.t().contiguous(), 4),
    }


def _unpack(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    plain = {
        "codes": unpack_stream(parts["codes"], 4).t().contiguous(),
        "scale": parts["scale"].t().contiguous(),
    }
    if not spec.symmetric:
        plain["zero"] = unpack_stream(parts["zero"], 4).t().contiguous()
    return plain


def _fits(spec: Spec, n: int, k: int) -> str | None:
    if spec.bits != 4:
        return f"the operator decodes 4 bits, not {spec.bits}"
    if n % 32 or k % spec.width(k):
        return f"[{n}, {k}]: the operator wants N % 32 == 0 and K a multiple of the group"
    return None


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    parts = weight.parts
    scale = parts["scale"].to(x.dtype)
    dense = torch.ops.hpu.convert_from_uint4(parts["codes"], scale, parts["zero"], x.dtype)
    if bias is None:
        torch.mm(x, dense, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense, out=out)


def _when(case: Case) -> str | None:
    if case.dtype == torch.float32:
        return "the operator decodes to bf16 and f16"
    return _fits(case.spec, case.n, case.k)


LAYOUTS = (Layout("hpu.uint4", _fits, _pack, _unpack),)

KERNELS = (Kernel("hpu.qgemm", "qgemm", _qgemm, _when, "hpu.uint4"),)
