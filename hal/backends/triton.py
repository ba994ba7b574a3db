# SPDX-License-Identifier: Apache-2.0
"""Triton kernels (kernels_triton/) for every GPU that Triton compiles for."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hal import codec, groupwise, tuned
from hal.backends import reference
from hal.layout import Layout, Parts
from hal.plan import Weight
from hal.qtensor import Params
from hal.registry import EMULATED, Case, Kernel, Launches, bucket
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


def _hadamard(x: Tensor, block: int) -> None:
    _import("hadamard").hadamard_(x, block)


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


@dataclass(slots=True)
class _Ready:
    """A weight as the kernels take it, and how they are launched for a bucket of rows."""

    planes: Any
    launches: dict[int, Any] = field(default_factory=dict)


def _bound(weight: Weight) -> _Ready:
    if weight.handle is None:
        shape, experts = weight.shape, weight.experts
        weight.handle = _Ready(_planes(weight.parts, weight.spec, shape, experts))
    handle: _Ready = weight.handle
    return handle


def _planes(parts: Parts, spec: Spec, shape: tuple[int, int], experts: int) -> Any:
    (n, k), at = shape, (parts["codes"], parts["scale"], parts.get("zero"))
    return _import("products").Planes(*at, n // experts, k, spec.width(k), spec.bits)


def _launch_of(weight: Weight, op: str, rows: int) -> Any:
    """Looked up once for a weight and a bucket of rows (of an expert)."""
    known, experts = _bound(weight).launches, weight.experts
    m = bucket(-(-rows // experts))
    if m not in known:
        sizes = (*weight.shape, caps(weight.device), m * experts, None, experts)
        known[m] = _launch(Case(op, weight.spec, weight.dtype, *sizes))[0]
    return known[m]


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    bias = None if bias is None else bias.contiguous()
    launch = _launch_of(weight, "qgemm", x.shape[0])
    _import("products").product(x, _bound(weight).planes, bias, out, launch)


def _qgemm_dense(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x and multiplied by torch."""
    dense = _import("products").decoded(_bound(weight).planes, x.dtype)
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


def _qgemm_grouped(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    launch = _launch_of(weight, "qgemm_grouped", x.shape[0])
    _import("products").grouped(x, _bound(weight).planes, offsets.contiguous(), out, launch)


# ---- how products are launched: the table's way (`products.configure`), or the fastest measured


def _compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def _table(case: Case) -> Any:
    spec, k, experts = case.spec, case.k, case.experts
    sizes = (case.n // experts, k, spec.width(k), spec.groups(k))
    if experts == 1:
        return _import("products").configure(case.m, *sizes, case.caps.units)
    return _import("products").configure(max(2, -(-case.m // experts)), *sizes, 1)


def _launch(case: Case) -> tuple[Any, tuned.Launch]:
    """The launch of a case, and what was measured if that is where it is from."""
    table, found = _table(case), tuned.find(case, _compiler())
    own = {name: found.get(name) for name in ("bn", "warps", "stages")}
    launch = replace(table, **own)
    if launch not in _import("products").candidates(table):
        return table, {}
    return launch, found


def _explain(case: Case) -> str:
    launch, found = _launch(case)
    how = ", ".join(f"{name} {value}" for name, value in asdict(launch).items())
    if not found:
        return f"{how}: from the table; `python -m hal tune` measures others"
    return f"{how}: measured, {found.get('ms')} ms to the table's {found.get('table_ms')}"


def _run(case: Case, device: torch.device) -> tuple[Callable[[Any], None], Tensor]:
    """The product of a case with numbers of its own, for any launch, and what it writes to."""
    rng, spec, experts = torch.Generator().manual_seed(0), case.spec, case.experts
    n, k, groups = case.n, case.k, spec.groups(case.k)
    parts = {
        "codes": torch.randint(1 << spec.bits, (n, k), dtype=torch.uint8, generator=rng),
        "scale": torch.rand(n, groups, generator=rng).to(spec.scale_dtype),
    }
    if not spec.symmetric:
        parts["zero"] = torch.randint(1 << spec.bits, (n, groups), dtype=torch.uint8, generator=rng)
    stored = _to_planes({name: t.to(device) for name, t in parts.items()}, spec)
    planes, products = _planes(stored, spec, (n, k), experts), _import("products")
    x = torch.randn(case.m, k, generator=rng).to(device, case.dtype)
    out = torch.empty(case.m, n // experts, dtype=case.dtype, device=device)
    if experts == 1:
        return lambda launch: products.product(x, planes, None, out, launch), out
    offsets = (torch.arange(experts + 1) * case.m // experts).to(device, torch.int32)
    return lambda launch: products.grouped(x, planes, offsets, out, launch), out


def _milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


GAIN = 0.98  #: of the table's time: what differs by less is noise


def _tune(case: Case, device: torch.device) -> str:
    """Measure what gives the table's bits on this device; keep the fastest."""
    from triton.errors import TritonError

    run, out = _run(case, device)
    table = _table(case)
    run(table)
    want, times = out.clone(), {table: _milliseconds(lambda: run(table))}
    for launch in _import("products").candidates(table):
        try:
            run(launch)
        except TritonError:  # more shared memory or registers than this device has
            continue
        if launch != table and torch.equal(out, want):
            times[launch] = _milliseconds(lambda launch=launch: run(launch))  # type: ignore[misc]
    best = min(times, key=lambda launch: times[launch])
    if times[best] > GAIN * times[table]:
        best = table
    measured = {"ms": round(times[best], 5), "table_ms": round(times[table], 5)}
    chosen = {"bn": best.bn, "warps": best.warps, "stages": best.stages}
    tuned.keep(case, _compiler(), {**chosen, **measured})
    return _explain(case)


def _groups(case: Case) -> str | None:
    width = case.spec.width(case.k)
    if case.spec.groups(case.k) > 1 and width % 16:
        return f"groups of {width} are no multiple of 16"
    return None


def _small_blocks(case: Case) -> str | None:
    most = _import("hadamard").MOST
    return None if case.spec.group <= most else f"blocks of {case.spec.group} exceed {most}"


def _many_rows(case: Case) -> str | None:
    if case.dtype == torch.float32:
        return "f32: rounding to it gains nothing"
    few = f"m < {DENSE}: triton.qgemm is faster"
    return _groups(case) or (None if case.m >= DENSE else few)


LAYOUTS = (Layout("triton.planes", lambda spec, n, k: None, _to_planes, _from_planes, 1),)

MEASURED = Launches(_explain, _tune)

KERNELS = (
    Kernel("triton.search", "search", _search),
    Kernel("triton.qdq", "qdq", _qdq),
    Kernel("triton.qdq_step", "qdq_step", _qdq_step),
    Kernel("triton.quantize", "quantize", _quantize),
    Kernel("triton.dequantize", "dequantize", _dequantize),
    Kernel("triton.quantize_act", "quantize_act", _quantize_act),
    Kernel("triton.hadamard", "hadamard", _hadamard, _small_blocks),
    *groupwise.packing(NAME, _repack),
    Kernel("triton.qgemm_dense", "qgemm", _qgemm_dense, _many_rows, "triton.planes"),
    Kernel("triton.qgemm", "qgemm", _qgemm, _groups, "triton.planes", launches=MEASURED),
    Kernel(
        "triton.qgemm_grouped",
        "qgemm_grouped",
        _qgemm_grouped,
        _groups,
        "triton.planes",
        launches=MEASURED,
    ),
)
