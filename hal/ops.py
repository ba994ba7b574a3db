# SPDX-License-Identifier: Apache-2.0
"""The verbs. Shapes, dtypes and devices are checked here, once; kernels below trust them.

N output rows, K input columns, G = groups of a row. Float = f32, bf16 or f16. All tensors of a call
live on one device. Mistakes of the caller raise ValueError; cases no kernel serves, Unsupported.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hal import device as devices
from hal.backends import native_layout
from hal.layout import LAYOUTS
from hal.plan import Weight, plan
from hal.qtensor import Params, Part, QTensor
from hal.registry import Case, Kernel, Unsupported, bucket, select
from hal.spec import Act, Spec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def search(w: Tensor, spec: Spec, *, importance: Tensor | None = None, grid: int = 0) -> Params:
    """Initial parameters of ``w [N, K]`` Float: range per group, multipliers 1, no offset.

    ``grid`` 0 takes the min-max range; otherwise that many multiples of it are tried and the one
    with the least ``importance``-weighted squared error kept (``[K]`` f32, None = equal).
    """
    _check_matrix(w, "w")
    if importance is not None and (
        importance.shape != w.shape[1:] or importance.dtype != torch.float32
    ):
        raise ValueError(f"importance must be f32 [{w.shape[1]}], not {_describe(importance)}")
    shape = (w.shape[0], spec.groups(w.shape[1]))
    amin, amax, lo, hi = (
        torch.empty(shape, dtype=torch.float32, device=w.device) for _ in range(4)
    )
    _run(_kernel("search", spec, w), w.device, w, spec, importance, grid, amin, amax)
    return Params(None, lo.fill_(1), hi.fill_(1), amin, amax)


def qdq(w: Tensor, p: Params, spec: Spec, *, out: Tensor | None = None) -> Tensor:
    """Fake-quantized ``w [N, K]`` Float, same dtype; no autograd. ``out`` may be reused."""
    _check_matrix(w, "w")
    _check_params(p, w, spec)
    out = torch.empty_like(w) if out is None else _check_like(out, w, "out")
    _run(_kernel("qdq", spec, w), w.device, w, p, spec, out)
    return out


def qdq_step_(
    p: Params, w: Tensor, grad: Tensor, spec: Spec, *, lr_v: float, lr_range: float
) -> None:
    """One signed gradient step in place on ``p.v``, ``p.lo``, ``p.hi`` (clamped to [0, 1]).

    ``grad [N, K]`` Float is dL/d qdq(w). ``lr_range`` 0 leaves the range alone.
    """
    _check_matrix(w, "w")
    _check_params(p, w, spec)
    _check_matrix(grad, "grad")
    if grad.shape != w.shape or grad.device != w.device:
        raise ValueError(f"grad must match w {_describe(w)}, not {_describe(grad)}")
    _run(_kernel("qdq_step", spec, w), w.device, p, w, grad, spec, lr_v, lr_range)


def quantize(w: Tensor, p: Params | None, spec: Spec, *, layout: str = "plain") -> QTensor:
    """Codes, scales and zero levels of ``w [N, K]`` Float in a file layout (`pack`).

    ``p`` None rounds to nearest in the min-max range that `search` gives: where a kernel does all
    of it at once, in one pass from weight to file.
    """
    _check_matrix(w, "w")
    n, k = w.shape
    _check_layout(layout, spec, (n, k))
    if p is None:
        case = Case("round", spec, w.dtype, n, k, devices.caps(w.device), layout=layout)
        parts = _run(select(case), w.device, w, spec, layout)
        return QTensor(spec, (n, k), layout, parts)
    _check_params(p, w, spec)
    groups = (n, spec.groups(k))
    parts = {
        "codes": devices.empty((n, k), torch.uint8, w.device),
        "scale": torch.empty(groups, dtype=spec.scale_dtype, device=w.device),
    }
    if not spec.symmetric:
        parts["zero"] = torch.empty(groups, dtype=torch.uint8, device=w.device)
    _run(_kernel("quantize", spec, w), w.device, w, p, spec, parts)
    return pack(QTensor(spec, (n, k), "plain", parts), layout)


def dequantize(q: QTensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``[N, K]`` weight of any layout: scale * (level - zero) in f32, then rounded to ``dtype``."""
    q = pack(q, "plain")
    out = devices.empty(q.shape, dtype, q.device)
    _run(_kernel("dequantize", q.spec, out), out.device, q.parts, q.spec, out)
    return out if q.perm is None else out[:, q.perm.argsort()]


def pack(q: QTensor, layout: str) -> QTensor:
    """The same numbers in another file layout: exact, or Unsupported when it cannot hold them."""
    _check_layout(layout, q.spec, q.shape)
    if q.perm is not None and layout != "plain":
        raise Unsupported(f"layout {layout} has no column order (act-order); use plain")
    if q.layout == layout:
        return q
    if q.layout == "stream" and (turned := LAYOUTS[layout].turned):
        words = q.parts["qweight"].t()
        place = devices.empty((words.shape[0], words.shape[1]), words.dtype, words.device)
        return q.with_parts(layout, turned(place.copy_(words), q.parts, q.spec))
    if q.layout != "plain":
        q = q.with_parts("plain", _repack("unpack", q, q.layout))
    return q if layout == "plain" else q.with_parts(layout, _repack("pack", q, layout))


def _check_layout(layout: str, spec: Spec, shape: tuple[int, int]) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if reason := LAYOUTS[layout].fits(spec, *shape):
        raise Unsupported(f"layout {layout} cannot hold {spec}: {reason}")


def refuse(spec: Spec, shape: tuple[int, int], layout: str) -> str | None:
    """Why a file layout cannot hold an ``[N, K]`` weight of this spec, or None."""
    return LAYOUTS[layout].fits(spec, *shape)


def describe(spec: Spec, shape: tuple[int, int], layout: str) -> dict[str, Part]:
    """Dtype and shape of every part of an ``[N, K]`` weight in a file layout."""
    stored = LAYOUTS[layout].stored(spec, *shape)
    return {name: Part(*part) for name, part in stored.items()}


def _repack(op: str, q: QTensor, layout: str) -> dict[str, Tensor]:
    case = Case(op, q.spec, torch.uint8, *q.shape, devices.caps(q.device), layout=layout)
    parts: dict[str, Tensor] = _run(select(case), q.device, q.parts, q.spec, q.shape, layout)
    return parts


def quantize_act(x: Tensor, act: Act, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` Float -> codes s8 [M, K], scale f32 [M, G] (computed unless given)."""
    _check_matrix(x, "x")
    spec = Spec(act.elem, act.group, "f32")
    codes_scale: tuple[Tensor, Tensor] = _run(
        _kernel("quantize_act", spec, x), x.device, x, act.group, scale
    )
    return codes_scale


def hadamard_(x: Tensor, block: int) -> None:
    """Rotate ``x [M, K]`` Float in place: every ``block`` columns times Sylvester's matrix over
    sqrt(block), in f32. Its own inverse; W H and x H give the product of W and x.

    ``block`` is a power of two that divides K, else ValueError.
    """
    _check_matrix(x, "x")
    if block < 1 or block & (block - 1) or x.shape[1] % block:
        raise ValueError(f"block must be a power of two that divides {x.shape[1]}, not {block}")
    _run(_kernel("hadamard", Spec("s8", block, "f32"), x), x.device, x, block)


def prepare(
    q: QTensor,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    act: Act | None = None,
) -> Weight:
    """Make ``q`` ready to multiply ``dtype`` activations on ``device``: native layout, kernels.

    ``act`` allows products with activations quantized like that on the way (`quantize_act`), where
    that is faster; elsewhere, and without it, products are exact.
    """
    if dtype not in FLOATS:
        raise ValueError(f"activations of {dtype} are not supported; use one of {FLOATS}")
    target = q.device if device is None else device
    plain = pack(q, "plain")
    rows = plan(plain, dtype, target, act)
    name = rows[0][1].layout
    moved = {part: t.to(target) for part, t in plain.parts.items()}
    native = native_layout(name).pack(moved, q.spec)
    perm = None if q.perm is None else _checked_perm(q).to(target)
    return Weight(q.spec, q.shape, q.experts, dtype, name, native, rows, act, perm)


def restore(w: Weight) -> QTensor:
    """Inverse of `prepare`: the plain codes, scales and zero levels, bit for bit."""
    layout = native_layout(w.layout)
    parts = layout.unpack(w.parts, w.spec, w.shape)
    return QTensor(w.spec, w.shape, "plain", parts, w.experts, w.perm)


def join(weights: Sequence[Weight]) -> Weight | None:
    """One weight whose rows are those of all, so that one product serves an input they share.

    The numbers do not change: rows are independent. The weights given become views of it, so
    nothing is held twice. None where they differ in more than their rows, or where their layout
    cannot be cut between them.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    kinds = {(w.spec, w.shape[1], w.dtype, w.layout, w.act, w.device) for w in weights}
    rows = native_layout(first.layout).rows
    cut = rows and not any(w.shape[0] % rows for w in weights[:-1])
    plain = all(
        w.experts == 1 and w.perm is None and w.parts.keys() <= {"codes", "scale", "zero"}
        for w in weights
    )
    if len(kinds) > 1 or not cut or not plain:
        return None
    shape = (sum(w.shape[0] for w in weights), first.shape[1])
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in first.parts}
    blank = QTensor(first.spec, shape, "plain", {})
    kernels = plan(blank, first.dtype, first.device, first.act)
    joined = Weight(first.spec, shape, 1, first.dtype, first.layout, parts, kernels, first.act)
    joined.members = tuple(weights)
    _show(joined)
    return joined


def _show(joined: Weight) -> None:
    """Let the members of a weight view it."""
    for name, whole in joined.parts.items():
        pieces = torch.split(whole, [len(w.parts[name]) for w in joined.members])
        for w, piece in zip(joined.members, pieces, strict=True):
            w.parts[name], w.handle = piece, None


def settle(weights: Sequence[Weight]) -> None:
    """Move the weights of a model together, in the order given, where their layout has a place.

    In pages of 2 MB instead of 4 KB a model is read 1.25 times as fast (W4, 0.6 B parameters, one
    thread). Numbers do not change; members of joined weights (`join`) go on to view them.
    """
    for name in dict.fromkeys(w.layout for w in weights):
        own = [w for w in weights if w.layout == name]
        memory, at = native_layout(name).memory, 0
        if memory is None:
            continue
        place = memory(sum(_aligned(t.nbytes) for w in own for t in w.parts.values()))
        for w in own:
            for part, t in w.parts.items():
                moved = place[at : at + t.nbytes].view(t.dtype).view(t.shape)
                w.parts[part] = moved.copy_(t)
                at += _aligned(t.nbytes)
            w.handle = None
            if w.members:
                _show(w)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def qgemm(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ w.T + bias -> [..., N]`` in the dtype of ``x``; accumulates in f32."""
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.hal.qgemm(x, w.token, bias)
        return compiled
    n, k = w.shape
    if x.dtype != w.dtype or x.shape[-1] != k or x.device != w.device:
        raise ValueError(f"x must be {w.dtype} [..., {k}] on {w.device}, not {_describe(x)}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be f32, bf16 or f16 [{n}], not {_describe(bias)}")
    flat = x if x.ndim == 2 else x.reshape(-1, k)  # every call of torch here costs 0.7 us
    if w.perm is not None:
        flat = flat.index_select(1, w.perm)
    m = flat.shape[0]
    out = flat.new_empty(m, n)
    if m and n:
        _run(w.kernel(m), x.device, flat.contiguous(), w, bias, out)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], n)


def qgemm_grouped(x: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    """Rows of ``x [T, K]`` sorted by expert times that expert's weight -> ``[T, N]``.

    ``offsets [E + 1]`` i32: expert e owns rows ``offsets[e] : offsets[e + 1]``.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.hal.qgemm_grouped(x, w.token, offsets)
        return compiled
    n, k = w.shape[0] // w.experts, w.shape[1]
    if x.dtype != w.dtype or x.ndim != 2 or x.shape[1] != k or x.device != w.device:
        raise ValueError(f"x must be {w.dtype} [T, {k}] on {w.device}, not {_describe(x)}")
    if offsets.shape != (w.experts + 1,) or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be i32 [{w.experts + 1}], not {_describe(offsets)}")
    if w.experts == 1:  # prepared as any other weight
        if (ends := offsets.tolist()) != [0, x.shape[0]]:
            raise ValueError(f"offsets must rise from 0 to {x.shape[0]}, not {ends}")
        return qgemm(x, w)
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    if out.numel():
        if w.perm is not None:
            x = x.index_select(1, w.perm)
        _run(w.kernel(x.shape[0]), x.device, x.contiguous(), w, offsets, out)
    return out


def _run(row: Kernel, device: torch.device, *args: Any) -> Any:
    """Calls a kernel with the device of its tensors as torch's current one: it launches there."""
    if device.index is None or device.index == torch.accelerator.current_device_index():
        return row.fn(*args)
    with devices.current(device):
        return row.fn(*args)


def _kernel(op: str, spec: Spec, w: Tensor) -> Kernel:
    n, k = w.shape
    return select(
        Case(
            op,
            spec,
            w.dtype,
            n,
            k,
            devices.caps(w.device),
            m=bucket(n) if op == "quantize_act" else 0,
        )
    )


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def _checked_perm(q: QTensor) -> Tensor:
    perm, k = q.perm, q.shape[1]
    assert perm is not None
    columns = torch.arange(k, dtype=torch.int32, device=perm.device)
    if perm.shape != (k,) or perm.dtype != torch.int32 or not torch.equal(perm.sort()[0], columns):
        raise ValueError(f"perm must be a permutation of i32 [{k}], not {_describe(perm)}")
    return perm


def _check_matrix(w: Tensor, name: str) -> None:
    if w.ndim != 2 or w.dtype not in FLOATS or not w.is_contiguous():
        raise ValueError(f"{name} must be a contiguous f32, bf16 or f16 matrix, not {_describe(w)}")


def _check_like(out: Tensor, w: Tensor, name: str) -> Tensor:
    if (
        out.shape != w.shape
        or out.dtype != w.dtype
        or out.device != w.device
        or not out.is_contiguous()
    ):
        raise ValueError(f"{name} must match {_describe(w)}, not {_describe(out)}")
    return out


def _check_params(p: Params, w: Tensor, spec: Spec) -> None:
    groups = (w.shape[0], spec.groups(w.shape[1]))
    for name in ("lo", "hi", "amin", "amax"):
        t: Tensor = getattr(p, name)
        if t.shape != groups or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous f32 {list(groups)}, not {_describe(t)}")
        if t.device != w.device:
            raise ValueError(f"{name} must be on {w.device}, not {_describe(t)}")
    if p.v is not None:
        right = p.v.shape == w.shape and p.v.dtype == torch.float32 and p.v.device == w.device
        if not right or not p.v.is_contiguous():
            raise ValueError(f"v must be contiguous f32 {list(w.shape)}, not {_describe(p.v)}")
