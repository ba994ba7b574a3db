# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: group-wise verbs and products of few rows in CUDA C++ (kernels_cuda/)."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hal import groupwise
from hal.backends import reference
from hal.layout import Layout, Parts, as_i32
from hal.plan import Weight
from hal.registry import EMULATED, Case, Kernel
from hal.spec import Spec

NAME = "cuda"
KINDS = {NAME: EMULATED}
DTYPES = groupwise.DTYPES
ROWS, CHUNK, STEP = 16, 128, 16  # rows of a tile, columns of a chunk and of a tensor-core product
FEW = 64  # rows; from more on the weight is decoded for torch's dense product


@cache
def _import() -> ModuleType | str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    try:
        return importlib.import_module("hal._cuda")
    except ImportError as error:
        return f"hal._cuda not built (cmake -DHAL_CUDA=ON): {error}"


def probe() -> str | None:
    module = _import()
    return module if isinstance(module, str) else None


def _native() -> ModuleType:
    module = _import()
    assert not isinstance(module, str), module
    return module


def _stream(device: torch.device) -> int:
    """Where torch queues its work on a device."""
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _units(device: torch.device) -> int:
    return caps(device).units


def _where(device: torch.device) -> tuple[int, int]:
    """How the group-wise verbs are to run: stream, and the device's processors."""
    return _stream(device), _units(device)


#: What torch tells of the device, and torch's own operations between products.
caps, block_ops, probes = reference.caps, reference.block_ops, reference.probes


# ---- the weight in fragment order (kernels_cuda/qgemm.cuh)


def _planes(bits: int) -> tuple[int, ...]:
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def _lanes(n: int, k: int) -> tuple[int, ...]:
    """Codes ``[n, k]``, padded: tile, half, row, chunk, step, part, pair, place in the pair."""
    return (n // ROWS, 2, 8, k // CHUNK, CHUNK // STEP, 4, 2, 2)


def _split(t: Tensor, at: int, sizes: tuple[int, ...]) -> Tensor:
    return t.reshape(*t.shape[:at], *sizes, *t.shape[at + 1 :])


def _to_fragments(parts: Parts, spec: Spec) -> Parts:
    n, k = parts["codes"].shape
    codes = F.pad(parts["codes"], (0, -k % CHUNK, 0, -n % ROWS))
    # to tile, chunk, half, pairs of the row, place in the pair, lane
    shaped = codes.view(_lanes(*codes.shape)).permute(0, 3, 1, 4, 6, 7, 2, 5)
    pairs = shaped.reshape(*shaped.shape[:3], 16, 2, 32).to(torch.int64)
    words, shift = [], 0
    for width in _planes(spec.bits):
        field = _split(pairs >> shift & (1 << width) - 1, 3, (width, 16 // width))
        both = field[..., 0, :] | field[..., 1, :] << 16
        place = width * torch.arange(16 // width, device=codes.device)[:, None]
        words.append((both << place).sum(-2))
        shift += width
    own = torch.cat(words, 3).flatten(2, 3)  # tile, chunk, 2 bits words, lane
    parts = {name: _by_tiles(t) for name, t in parts.items() if name != "codes"}
    return {"codes": as_i32(_by_fours(own)), **parts}


def _from_fragments(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    (n, k), bits = shape, spec.bits
    words = parts["codes"].to(torch.int64) & 0xFFFFFFFF
    own = _split(_from_fours(words), 2, (2, bits))
    pairs = torch.zeros(*own.shape[:3], 16, 2, 32, dtype=torch.int64, device=words.device)
    shift = start = 0
    for width in _planes(bits):
        plane = own[:, :, :, start : start + width, None]
        place = width * torch.arange(16 // width, device=words.device)[:, None]
        fields = torch.stack((plane >> place, plane >> place + 16), -2)
        pairs |= (fields & (1 << width) - 1).flatten(3, 4) << shift
        shift, start = shift + width, start + width
    tiles, chunks = own.shape[:2]
    shaped = pairs.view(tiles, chunks, 2, CHUNK // STEP, 2, 2, 8, 4).permute(0, 2, 6, 1, 3, 7, 4, 5)
    codes = shaped.reshape(tiles * ROWS, chunks * CHUNK)[:n, :k].to(torch.uint8).contiguous()
    kept = {
        name: t.transpose(1, 2).reshape(tiles * ROWS, -1)[:n].contiguous()
        for name, t in parts.items()
        if name != "codes"
    }
    return {"codes": codes, **kept}


def _by_fours(words: Tensor) -> Tensor:
    """Words of a lane side by side, four at a time; two may be left over."""
    whole = words.shape[2] // 4 * 4
    fours = _split(words[:, :, :whole], 2, (-1, 4)).transpose(3, 4)
    last = words[:, :, whole:].transpose(2, 3)
    return torch.cat((fours.flatten(2), last.flatten(2)), 2).view(words.shape)


def _from_fours(words: Tensor) -> Tensor:
    tiles, chunks, count, lanes = words.shape
    flat, whole = words.flatten(2), count // 4 * 4
    fours = flat[:, :, : whole * lanes].view(tiles, chunks, whole // 4, lanes, 4).transpose(3, 4)
    last = flat[:, :, whole * lanes :].view(tiles, chunks, lanes, count - whole).transpose(2, 3)
    return torch.cat((fours.reshape(tiles, chunks, whole, lanes), last), 2)


def _by_tiles(t: Tensor) -> Tensor:
    """``[N, G]`` -> ``[tiles, G, 16]``, zero padded."""
    padded = F.pad(t, (0, 0, 0, -t.shape[0] % ROWS))
    return _split(padded, 0, (-1, ROWS)).transpose(1, 2).contiguous()


def shift(spec: Spec, k: int) -> int:
    """log2 of the columns of a group; 31 where a row is one."""
    return 31 if spec.groups(k) == 1 else spec.width(k).bit_length() - 1


def steps(spec: Spec, k: int) -> int:
    """Tensor-core products of a group, 8 for larger ones."""
    return 8 if spec.groups(k) == 1 else min(8, spec.width(k) // STEP)


def _bound(weight: Weight) -> Any:
    if weight.handle is None:
        spec, (n, k), parts = weight.spec, weight.shape, weight.parts
        zero = parts["zero"].data_ptr() if "zero" in parts else 0
        at = (parts["codes"].data_ptr(), parts["scale"].data_ptr(), zero)
        sizes = (n, weight.experts, k, parts["codes"].shape[1], spec.groups(k), shift(spec, k))
        how = (DTYPES[spec.scale_dtype], spec.bits, steps(spec, k))
        weight.handle = _native().Weight(*at, *sizes, *how)
    return weight.handle


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    bias = None if bias is None else bias.contiguous()
    at, kind = (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    args = (x.data_ptr(), x.shape[0], at, kind, out.data_ptr(), DTYPES[x.dtype])
    _bound(weight).product(*args, _stream(x.device))


def _qgemm_dense(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x and multiplied by torch."""
    dense = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    _bound(weight).decode(dense.data_ptr(), DTYPES[x.dtype], _stream(x.device))
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


def _qgemm_grouped(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    offsets = offsets.contiguous()
    args = (x.data_ptr(), x.shape[0], offsets.data_ptr(), out.data_ptr(), DTYPES[x.dtype])
    _bound(weight).grouped(*args, _stream(x.device))


def refuse(case: Case) -> str | None:
    """Why this layout does not serve a weight, or None."""
    width = case.spec.width(case.k)
    if case.dtype == torch.float32:
        return "tensor cores here take bf16 and f16"
    if case.k % 4:
        return f"{case.k} columns are no multiple of 4"
    if case.spec.groups(case.k) > 1 and (width < STEP or width & (width - 1)):
        return f"groups of {width} are no power of two from 16 on"
    return None


def _few(case: Case) -> str | None:
    return refuse(case) or (None if case.m <= FEW else f"m > {FEW}: the dense product is faster")


def _experts(case: Case) -> str | None:
    rows = case.n // case.experts
    tiles = f"{rows} rows of an expert are no multiple of {ROWS}" if rows % ROWS else None
    return refuse(case) or tiles


LAYOUTS = (Layout("cuda.fragments", lambda spec, n, k: None, _to_fragments, _from_fragments, ROWS),)

KERNELS = (
    *groupwise.rows(NAME, _native, _where),
    Kernel("cuda.qgemm", "qgemm", _qgemm, _few, "cuda.fragments"),
    Kernel("cuda.qgemm_dense", "qgemm", _qgemm_dense, refuse, "cuda.fragments"),
    Kernel("cuda.qgemm_grouped", "qgemm_grouped", _qgemm_grouped, _experts, "cuda.fragments"),
)
