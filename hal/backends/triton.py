# SPDX-License-Identifier: Apache-2.0
"""Triton kernels (kernels_triton/) for every GPU that Triton compiles for."""

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from hal import codec, groupwise
from hal.backends import reference
from hal.layout import Layout, Parts
from hal.plan import Weight
from hal.qtensor import Params
from hal.registry import EMULATED, Case, Kernel
from hal.spec import Spec

NAME = "triton"
DENSE = 1024  # rows from which decoding the weight once and torch's dense product is the faster way
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = dict.fromkeys(("cuda", "xpu", *(("cpu",) if INTERPRETED else ())), EMULATED)


@cache
def probe() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error}): pip install autoround[triton]"
    if INTERPRETED or any(
        driver.driver.is_active() for driver in triton.backends.backends.values()
    ):
        return None
    return "no GPU that triton can use"


@cache
def _import(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"kernels_triton.{name}")


#: What torch tells of the device, and torch's own operations between products.
caps, block_ops, probes = reference.caps, reference.block_ops, reference.probes


@cache
def _encoding(spec: Spec, n: int, k: int) -> object:
    least = float(torch.tensor(spec.min_scale, dtype=spec.scale_dtype))
    shape = (n, k, spec.width(k), spec.groups(k))
    return _import("codec").Encoding(*shape, spec.bits, spec.symmetric, spec.scale_dtype, least)


def _search(
    w: Tensor, spec: Spec, importance: Tensor | None, grid: int, amin: Tensor, amax: Tensor
) -> None:
    factors = codec.search_factors(grid) if grid > 1 else []
    weights = None if importance is None else importance.contiguous()
    _import("quantize").search(w, weights, factors, _encoding(spec, *w.shape), amin, amax)


def _qdq(w: Tensor, p: Params, spec: Spec, out: Tensor) -> None:
    _import("quantize").qdq(w, p, _encoding(spec, *w.shape), out)


def _qdq_step(p: Params, w: Tensor, grad: Tensor, spec: Spec, lr_v: float, lr_range: float) -> None:
    _import("quantize").qdq_step_(p, w, grad, _encoding(spec, *w.shape), lr_v, lr_range)


def _quantize(w: Tensor, p: Params, spec: Spec, parts: Parts) -> None:
    codes, scale, zero = parts["codes"], parts["scale"], parts.get("zero")
    _import("quantize").quantize(w, p, _encoding(spec, *w.shape), codes, scale, zero)


def _dequantize(parts: Parts, spec: Spec, out: Tensor) -> None:
    parts = {name: t.contiguous() for name, t in parts.items()}
    encoding = _encoding(spec, *out.shape)
    codes, scale, zero = parts["codes"], parts["scale"], parts.get("zero")
    _import("quantize").dequantize(codes, scale, zero, encoding, out)


def _quantize_act(x: Tensor, group: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    encoding = _encoding(Spec("s8", group, "f32"), *x.shape)
    codes_scale: tuple[Tensor, Tensor] = _import("quantize").quantize_act(x, encoding, scale)
    return codes_scale


def _walk(layout: str, n: int, k: int, bits: int) -> tuple[tuple[int, int, int, int], int, bool]:
    """How a file layout lies: strides of rows and neighbours in codes and words, rows, AWQ's order.

    Rows are the direction that is not packed.
    """
    if layout == "awq":
        return (1, k, n // 8, 1), k, True
    if layout == "stream":
        return (k, 1, k * bits // 32, 1), n, False
    return (k, 1, 1, n), n, False


def _repack(
    pack: bool, spec: Spec, shape: tuple[int, int], layout: str, codes: Tensor, words: Tensor
) -> None:
    strides, rows, awq = _walk(layout, *shape, spec.bits)
    module = _import("pack")
    verb = module.pack if pack else module.unpack
    verb(codes, words, spec.bits, rows, module.Strides(*strides), awq)


# ---- products: the weight in bit planes (kernels_triton/products.py)


def _to_planes(parts: Parts, spec: Spec) -> Parts:
    kept = {name: t.contiguous() for name, t in parts.items() if name != "codes"}
    return {"codes": _import("products").to_planes(parts["codes"], spec.bits), **kept}


def _from_planes(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    kept = {name: t for name, t in parts.items() if name != "codes"}
    return {"codes": _import("products").from_planes(parts["codes"], spec.bits, shape[1]), **kept}


def _bound(weight: Weight) -> tuple[object, int]:
    """The weight as the kernels take it and the device's processors, looked up once."""
    if weight.handle is None:
        spec, (n, k), parts = weight.spec, weight.shape, weight.parts
        shape = (n // weight.experts, k, spec.width(k), spec.bits)
        planes = _import("products").Planes(
            parts["codes"], parts["scale"], parts.get("zero"), *shape
        )
        weight.handle = (planes, caps(weight.device).units)
    handle: tuple[object, int] = weight.handle
    return handle


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    planes, units = _bound(weight)
    bias = None if bias is None else bias.contiguous()
    _import("products").product(x, planes, bias, out, units)


def _qgemm_dense(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x and multiplied by torch."""
    dense = _import("products").decoded(_bound(weight)[0], x.dtype)
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


def _qgemm_grouped(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    _import("products").grouped(x, _bound(weight)[0], offsets.contiguous(), out)


def _groups(case: Case) -> str | None:
    width = case.spec.width(case.k)
    if case.spec.groups(case.k) > 1 and width % 16:
        return f"groups of {width} are no multiple of 16"
    return None


def _many_rows(case: Case) -> str | None:
    if case.dtype == torch.float32:
        return "f32: rounding to it gains nothing"
    few = f"m < {DENSE}: triton.qgemm is faster"
    return _groups(case) or (None if case.m >= DENSE else few)


LAYOUTS = (Layout("triton.planes", lambda spec, n, k: None, _to_planes, _from_planes, 1),)

KERNELS = (
    Kernel("triton.search", "search", _search),
    Kernel("triton.qdq", "qdq", _qdq),
    Kernel("triton.qdq_step", "qdq_step", _qdq_step),
    Kernel("triton.quantize", "quantize", _quantize),
    Kernel("triton.dequantize", "dequantize", _dequantize),
    Kernel("triton.quantize_act", "quantize_act", _quantize_act),
    *groupwise.packing(NAME, _repack),
    Kernel("triton.qgemm_dense", "qgemm", _qgemm_dense, _many_rows, "triton.planes"),
    Kernel("triton.qgemm", "qgemm", _qgemm, _groups, "triton.planes"),
    Kernel("triton.qgemm_grouped", "qgemm_grouped", _qgemm_grouped, _groups, "triton.planes"),
)
