# SPDX-License-Identifier: Apache-2.0
"""The group-wise verbs of a native module (csrc/group_ops.h): from tensors to addresses, sizes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hal import codec
from hal.layout import Parts
from hal.qtensor import Params
from hal.registry import Kernel
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
    """Rows of the six verbs for a backend called ``name``.

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

    verbs: dict[str, Callable[..., Any]] = {
        "search": search,
        "qdq": qdq,
        "qdq_step": step,
        "quantize": quantize,
        "dequantize": dequantize,
        "quantize_act": quantize_act,
    }
    return tuple(Kernel(f"{name}.{op}", op, fn) for op, fn in verbs.items())
