# SPDX-License-Identifier: Apache-2.0
"""Rows that backends share: the group-wise verbs of a native module (csrc/group_ops.h), from
tensors to addresses and sizes; and packing into file layouts by a kernel for the codes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hal import codec, memory
from hal.layout import LAYOUTS, Parts
from hal.qtensor import Params
from hal.registry import Case, Kernel
from hal.spec import Spec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # HalFloat of csrc/hal_abi.h


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@cache
def shape(module: Any, spec: Spec, n: int, k: int, dtype: torch.dtype) -> Any:
    """`HalShape` of a ``[n, k]`` matrix."""
    least = float(torch.tensor(spec.min_scale, dtype=spec.scale_dtype))
    scale = DTYPES[spec.scale_dtype]
    return module.Shape(n, k, spec.width(k), spec.bits, spec.symmetric, DTYPES[dtype], scale, least)


def plain(parts: Parts) -> tuple[int, int, int]:
    """Addresses of codes, scale and zero."""
    return address(parts["codes"]), address(parts["scale"]), address(parts.get("zero"))


@cache
def _factors(grid: int, device: torch.device) -> Tensor:
    found = codec.search_factors(grid) if grid > 1 else []
    return torch.tensor(found, dtype=torch.float32, device=device)


def rows(
    name: str, native: Callable[[], Any], where: Callable[[torch.device], tuple[int, int]]
) -> tuple[Kernel, ...]:
    """Rows of the seven verbs for a backend called ``name``.

    ``native``: its module. ``where``: the two integers that tell the module how to run on a device,
    the first arguments of each of its functions.
    """

    def params(p: Params) -> Any:
        return native().Params(*(address(t) for t in (p.v, p.lo, p.hi, p.amin, p.amax)))

    def search(
        w: Tensor, spec: Spec, importance: Tensor | None, grid: int, amin: Tensor, amax: Tensor
    ) -> None:
        weights = None if importance is None else importance.contiguous()
        factors = _factors(grid, w.device)
        at = (address(w), address(weights), address(factors), len(factors))
        given = shape(native(), spec, *w.shape, w.dtype)
        native().search(*where(w.device), given, *at, address(amin), address(amax))

    def qdq(w: Tensor, p: Params, spec: Spec, out: Tensor) -> None:
        given = shape(native(), spec, *w.shape, w.dtype)
        native().qdq(*where(w.device), given, address(w), params(p), address(out))

    def step(p: Params, w: Tensor, grad: Tensor, spec: Spec, lr_v: float, lr_range: float) -> None:
        given = shape(native(), spec, *w.shape, w.dtype)
        at = (address(w), address(grad), DTYPES[grad.dtype])
        native().qdq_step(*where(w.device), given, *at, params(p), lr_v, lr_range)

    def quantize(w: Tensor, p: Params, spec: Spec, parts: Parts) -> None:
        given = shape(native(), spec, *w.shape, w.dtype)
        native().quantize(*where(w.device), given, address(w), params(p), *plain(parts))

    def dequantize(parts: Parts, spec: Spec, out: Tensor) -> None:
        parts = {name: t.contiguous() for name, t in parts.items()}
        given = shape(native(), spec, *out.shape, out.dtype)
        native().dequantize(*where(out.device), given, *plain(parts), address(out))

    def quantize_act(x: Tensor, group: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        (m, k), spec, calculated = x.shape, Spec("s8", group, "f32"), scale is None
        codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
        if scale is None:
            scale = torch.empty(m, spec.groups(k), device=x.device)
        else:
            scale = scale.float().contiguous()
        given = shape(native(), spec, m, k, x.dtype)
        at = (address(x), address(codes), address(scale))
        native().quantize_act(*where(x.device), given, *at, not calculated)
        return codes, scale

    def round_(w: Tensor, spec: Spec, layout: str) -> Parts:
        stored = LAYOUTS[layout].stored(spec, *w.shape)
        parts = {part: _empty(size, dtype, w) for part, (dtype, size) in stored.items()}
        at = (parts["qweight"], parts["scale"], parts.get("zero"))
        given = shape(native(), spec, *w.shape, w.dtype)
        native().round(*where(w.device), given, address(w), *map(address, at))
        return parts

    verbs: dict[str, Callable[..., Any]] = {
        "search": search,
        "qdq": qdq,
        "qdq_step": step,
        "quantize": quantize,
        "dequantize": dequantize,
        "quantize_act": quantize_act,
    }
    found = tuple(Kernel(f"{name}.{op}", op, fn) for op, fn in verbs.items())
    return (*found, Kernel(f"{name}.round", "round", round_, _one_pass))


def _one_pass(case: Case) -> str | None:
    if case.layout != "stream":
        return f"layout {case.layout} is made in steps; stream in one"
    width = case.spec.width(case.k)
    return f"groups of {width} do not end at a byte" if width % 8 else None


#: pack (True) or unpack, spec, shape, file layout, codes u8, words i32.
Repack = Callable[[bool, Spec, tuple[int, int], str, Tensor, Tensor], None]
PACKED = ("gptq", "gptq_raw", "stream", "awq")


def packing(name: str, repack: Repack) -> tuple[Kernel, Kernel]:
    """Rows of ``pack`` and ``unpack`` for a backend called ``name``, whose ``repack`` turns codes
    into the words of every layout in `PACKED` and back.

    Scales and zero points, a hundredth of the bytes, go the reference's way.
    """

    def pack(parts: Parts, spec: Spec, shape: tuple[int, int], layout: str) -> Parts:
        codes = parts["codes"].contiguous()
        packed = LAYOUTS[layout].pack({**parts, "codes": codes[:32, :32]}, spec)
        dtype, words = LAYOUTS[layout].stored(spec, *shape)["qweight"]
        packed["qweight"] = _empty(words, dtype, codes)
        repack(True, spec, shape, layout, codes, packed["qweight"])
        return packed

    def unpack(parts: Parts, spec: Spec, shape: tuple[int, int], layout: str) -> Parts:
        words = parts["qweight"].contiguous()
        few = {**parts, "qweight": words[: spec.bits, : 8 * spec.bits]}
        plain = LAYOUTS[layout].unpack(few, spec, shape)
        plain["codes"] = _empty(shape, torch.uint8, words)
        repack(False, spec, shape, layout, plain["codes"], words)
        return plain

    def when(case: Case) -> str | None:
        return None if case.layout in PACKED else f"no packing of layout {case.layout} here"

    return (
        Kernel(f"{name}.pack", "pack", pack, when),
        Kernel(f"{name}.unpack", "unpack", unpack, when),
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, beside: Tensor) -> Tensor:
    if beside.is_cpu:
        return memory.host(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=beside.device)
