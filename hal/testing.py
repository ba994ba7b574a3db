# SPDX-License-Identifier: Apache-2.0
"""Is an answer right? Shared by the tests, ``python -m hal`` and whoever writes a kernel."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hal import codec, ops
from hal.layout import LAYOUTS
from hal.qtensor import Params, QTensor
from hal.spec import Spec

#: Largest relative Frobenius error of a product with exact weights: f32 sums, then the output's
#: rounding (half an ulp of bf16 is 2e-3 of a number, of f16 2.4e-4).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}

#: One spec of every kind a device must get right.
CHECKED = ("s4:g128:f16", "u4:g128:f16:int", "s3:g32:bf16", "u8:g0:f32:int", "s2:g100:f16")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every number; NaN equals NaN, and 0 equals -0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of ``want``, in f64."""
    want = want.double()
    scale = float(want.norm()) or 1.0
    return float((got.double() - want).norm()) / scale


def weights(n: int, k: int, seed: int) -> Tensor:
    """A plausible f32 weight on the CPU: Gaussian, rows of different size, a zero group."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng)
    w[0, : k // 2] = 0
    return w


def params(w: Tensor, spec: Spec, seed: int) -> Params:
    """Parameters somewhere in the middle of tuning, on the device of ``w``."""
    rng = torch.Generator().manual_seed(seed)
    amin, amax = codec.value_range(w.cpu(), spec)
    v = torch.rand(w.shape, generator=rng) - 0.5
    lo, hi = (1 - 0.2 * torch.rand(amin.shape, generator=rng) for _ in range(2))
    return Params(*(t.to(w.device) for t in (v, lo, hi, amin, amax)))


def check(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Run every verb on ``device`` and compare with the truth on the CPU: (what, right)."""
    for text in CHECKED:
        spec = Spec.parse(text)
        for what, test in (("tune", _tune), ("store", _store), ("multiply", _multiply)):
            yield f"{what} {text}", _runs(test, spec, device)


def _runs(test: Callable[[Spec, torch.device], bool], spec: Spec, device: torch.device) -> bool:
    try:
        return test(spec, device)
    except RuntimeError:  # a kernel that cannot run is as wrong as one that answers wrongly
        return False


def _tune(spec: Spec, device: torch.device) -> bool:
    w, grad = weights(33, 300, 1), weights(33, 300, 2)
    here, truth = params(w.to(device), spec, 3), params(w, spec, 3)
    right = same(ops.qdq(w.to(device), here, spec).cpu(), codec.qdq(w, truth, spec))
    ops.qdq_step_(here, w.to(device), grad.to(device), spec, lr_v=0.01, lr_range=0.02)
    codec.qdq_step_(truth, w, grad, spec, 0.01, 0.02)
    found = ops.search(w.to(device), spec, grid=8)
    amin, amax = codec.search(w, spec, None, 8)
    pairs = [(found.amin, amin), (found.amax, amax), (here.lo, truth.lo), (here.hi, truth.hi)]
    turned = w[:, :256].contiguous().to(device)
    ops.hadamard_(turned, 64)
    pairs.append((turned, codec.hadamard(w[:, :256], 64)))
    assert here.v is not None
    assert truth.v is not None
    return right and all(same(a.cpu(), b) for a, b in [*pairs, (here.v, truth.v)])


def quantized(w: Tensor, spec: Spec) -> QTensor:
    """``w`` quantized by its min-max range, on the device of ``w``."""
    return ops.quantize(w, ops.search(w, spec), spec)


def _store(spec: Spec, device: torch.device) -> bool:
    w = weights(64, 320, 4)
    q = quantized(w.to(device), spec)
    levels, _, scale, zero = codec.levels(w, ops.search(w, spec), spec)
    right = same(q.parts["codes"].cpu(), codec.ungrouped(levels, 320).to(torch.uint8))
    want = codec.decode(codec.ungrouped(levels, 320), scale, zero, spec)
    right = right and same(ops.dequantize(q, dtype=torch.float32).cpu(), want)
    for name, layout in LAYOUTS.items():
        if layout.fits(spec, *q.shape) is None:
            back = ops.pack(ops.pack(q, name), "plain")
            right = right and all(same(back.parts[part], t) for part, t in q.parts.items())
    return right


def _multiply(spec: Spec, device: torch.device) -> bool:
    w, right = weights(70, 300, 5), True
    q = quantized(w.to(device), spec)
    dense = ops.dequantize(q, dtype=torch.float32).cpu().double()
    for dtype, bound in TOLERANCE.items():
        ready = ops.prepare(q, dtype=dtype)
        for m in (1, 5, 70, 300):
            x = weights(m, 300, 6).to(dtype)
            got = ops.qgemm(x.to(device), ready).cpu()
            right = right and relative_error(got, x.double() @ dense.T) < bound
    return right
