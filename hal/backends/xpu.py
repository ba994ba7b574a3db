# SPDX-License-Identifier: Apache-2.0
"""Intel GPUs: SYCL kernels (kernels_sycl/), and oneDNN's product of 4-bit weights, from torch.

With ``ONEAPI_DEVICE_SELECTOR=opencl:cpu``, oneAPI's own switch, the same kernels run on the host
for tests, through Intel's OpenCL for processors.
"""

import importlib
import importlib.metadata
import os
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hal import groupwise
from hal.backends import cpu, reference
from hal.groupwise import DTYPES, address
from hal.layout import WORDS
from hal.plan import Weight
from hal.registry import EMULATED, WRITTEN, Caps, Case, Kernel
from hal.spec import Spec

NAME = "xpu"
HOST = os.environ.get("ONEAPI_DEVICE_SELECTOR") == "opencl:cpu"
KINDS = dict.fromkeys((NAME, *(("cpu",) if HOST else ())), EMULATED)
FEW, MANY = 32, 256  # most rows of products of ours: of plain ones, of those on matrix engines


@cache
def _import() -> ModuleType | str:
    if not HOST and not torch.xpu.is_available():
        return "no Intel GPU that torch can use"
    if HOST:
        _find_opencl()
    # Kernels are compiled for the device once, not once a process.
    os.environ.setdefault("SYCL_CACHE_PERSISTENT", "1")
    try:
        return importlib.import_module("hal._sycl")
    except ImportError as error:
        return f"hal._sycl not built (cmake -DHAL_SYCL=ON): {error}"


def _find_opencl() -> None:
    """Tell OpenCL's loader where pip has put Intel's driver for processors."""
    try:
        files = importlib.metadata.files("intel-opencl-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libintelocl.so":
            os.environ.setdefault("OCL_ICD_FILENAMES", os.path.realpath(str(file.locate())))
    if cpu.probe() is None and "amx" in cpu.isas():  # not used unless it is named
        os.environ.setdefault("CL_CONFIG_CPU_TARGET_ARCH", "sapphirerapids")


def probe() -> str | None:
    module = _import()
    return module if isinstance(module, str) else None


def _module() -> Any:
    module = _import()
    assert not isinstance(module, str)
    return module


#: torch's own operations between products.
block_ops, probes = reference.block_ops, reference.probes


def caps(device: torch.device) -> Caps:
    """What torch tells of the device, and whether it has matrix engines (``xmx``)."""
    found = reference.caps(device)
    module = torch.get_device_module(device)
    known = module.get_device_properties(device) if device.type == NAME else None
    engines = getattr(known, "has_subgroup_matrix_multiply_accumulate", False)
    return replace(found, features=frozenset({"xmx"} if engines else ()))


def _queue(device: torch.device) -> int:
    """torch's own queue of the device; 0 for the host's."""
    return 0 if device.type == "cpu" else int(torch.xpu.current_stream(device).sycl_queue)


@cache
def _units(device: torch.device) -> int:
    return caps(device).units


def _where(device: torch.device) -> tuple[int, int]:
    """How the group-wise verbs are to run: queue, and the device's processors."""
    return _queue(device), _units(device)


def _repack(
    pack: bool, spec: Spec, shape: tuple[int, int], layout: str, codes: Tensor, words: Tensor
) -> None:
    (n, k), awq = shape, layout == "awq"
    strides = {"stream": (1, k * spec.bits // 32), "awq": (n // 8, 1)}.get(layout, (n, 1))
    of = groupwise.shape(_module(), spec, n, k, torch.float32)
    at = (address(codes), address(words), *strides)  # along a row of the weight, across
    _module().repack(_queue(codes.device), pack, awq, of, *at)


# ---- products: the weight as rows of words (hal.layout.WORDS)


def _bound(weight: Weight) -> Any:
    if weight.handle is None:
        of = groupwise.shape(_module(), weight.spec, *weight.shape, weight.dtype)
        weight.handle = _module().Words(of, *groupwise.plain(weight.parts))
    return weight.handle


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    bias = None if bias is None else bias.contiguous()
    given = (address(bias), 0 if bias is None else DTYPES[bias.dtype])
    _bound(weight).product(_queue(x.device), address(x), x.shape[0], *given, address(out))


def _qgemm_dense(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x and multiplied by torch."""
    dense = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    _bound(weight).decode(_queue(x.device), address(dense))
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


def _qgemm_matrix(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x, piece by piece, on matrix engines."""
    m, padded = x.shape[0], F.pad(x, (0, 0, 0, -x.shape[0] % 32))
    sums = torch.empty(len(padded), out.shape[1], dtype=torch.float32, device=x.device)
    _bound(weight).matrix(_queue(x.device), address(padded), len(padded), address(sums))
    out.copy_(sums[:m] if bias is None else sums[:m] + bias.float())


def _qgemm_grouped(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    offsets = offsets.contiguous()
    at = (address(x), x.shape[0], address(offsets), weight.experts, address(out))
    _bound(weight).grouped(_queue(x.device), *at)


def _qgemm_int4(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """oneDNN's own, on the same words. It wants scales in the dtype of x and zero levels in s8,
    both transposed: made at every call, a thirtieth of the weight's bytes."""
    spec, parts = weight.spec, weight.parts
    scale = parts["scale"].t().to(x.dtype).contiguous()
    zero = parts["zero"].t().to(torch.int8).contiguous() if "zero" in parts else None
    if zero is None:
        zero = torch.full_like(scale, spec.half, dtype=torch.int8)
    group = spec.width(x.shape[1])
    product = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros
    found = product(x, parts["codes"], group, scale, zero)
    out.copy_(found if bias is None else found + bias)


def _many_rows(case: Case) -> str | None:
    if case.dtype == torch.float32:
        return "f32: rounding to it gains nothing"
    return None if case.m > FEW else f"m <= {FEW}: xpu.qgemm is faster, and exact"


def _int4(case: Case) -> str | None:
    width = case.spec.width(case.k)
    if case.caps.kind != NAME:
        return "torch has this product for Intel GPUs only"
    if case.spec.bits != 4:
        return f"oneDNN's product holds 4 bits, not {case.spec.bits}"
    if width % 32 or case.k % width:
        return f"{case.k} columns in groups of {width}: wants whole groups of a multiple of 32"
    return _many_rows(case)


def _matrix(case: Case) -> str | None:
    engines = {"xmx"} if case.dtype == torch.float16 else {"xmx", "amx"}
    if not engines & case.caps.features:
        return f"no matrix engines for {case.dtype}"
    if case.n % 16 or case.k % 32:
        return f"[{case.n}, {case.k}]: wants N % 16 == 0 and K % 32 == 0"
    return _many_rows(case) or (
        None if case.m <= MANY else f"m > {MANY}: the dense product is faster"
    )


LAYOUTS = (WORDS,)

KERNELS = (
    *groupwise.rows(NAME, _module, _where),
    *groupwise.packing(NAME, _repack),
    Kernel("xpu.qgemm_int4", "qgemm", _qgemm_int4, _int4, "words", WRITTEN),
    Kernel("xpu.qgemm_matrix", "qgemm", _qgemm_matrix, _matrix, "words"),
    Kernel("xpu.qgemm_dense", "qgemm", _qgemm_dense, _many_rows, "words"),
    Kernel("xpu.qgemm", "qgemm", _qgemm, layout="words"),
    Kernel("xpu.qgemm_grouped", "qgemm_grouped", _qgemm_grouped, layout="words"),
)
