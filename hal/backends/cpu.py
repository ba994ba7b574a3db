# SPDX-License-Identifier: Apache-2.0
"""CPU kernels written in C++ (csrc/): one table per instruction set, chosen at run time."""

import math
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hal import block, config, groupwise, memory
from hal import layout as file_layouts
from hal.block import Attention, Block, BlockOps, Linear, Step
from hal.layout import Layout, Parts
from hal.plan import Weight
from hal.registry import BUCKETS, MEASURED, Caps, Case, Kernel, Probes
from hal.spec import Spec

NAME = "cpu"
KINDS = {NAME: MEASURED}
DTYPES = groupwise.DTYPES
FILE_LAYOUTS = {"gptq": 0, "gptq_raw": 0, "awq": 1, "stream": 2}
TILE = 64


@cache
def _import() -> ModuleType | str:
    try:
        from hal import _cpu
    except ImportError as error:
        return f"hal._cpu not built: {error}"
    return _cpu


def probe() -> str | None:
    module = _import()
    return module if isinstance(module, str) else None


def native() -> ModuleType:
    """The native module. Raises RuntimeError with the reason when it is missing."""
    module = _import()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets of this machine that have kernels, best first."""
    return tuple(native().isas())


def isa() -> int:
    """Index into `isas` of the one to use. Raises ValueError if HAL_ISA names another."""
    name = config.isa()
    if not name:
        return 0
    if name not in isas():
        raise ValueError(f"HAL_ISA={name}: this machine has {', '.join(isas())}")
    return isas().index(name)


def caps(device: torch.device) -> Caps:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Caps(NAME, _model(), isas()[0], frozenset(isas()), os.cpu_count() or 1, pages)


def _model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else "CPU"


def _where(device: torch.device) -> tuple[int, int]:
    """How the native verbs are to run: instruction set and threads."""
    return isa(), torch.get_num_threads()


def _repack(
    pack: bool, spec: Spec, shape: tuple[int, int], layout: str, codes: Tensor, words: Tensor
) -> None:
    given = groupwise.shape(native(), spec, *shape, torch.float32)
    at = (codes.data_ptr(), words.data_ptr())
    native().repack(isa(), pack, given, FILE_LAYOUTS[layout], *at, torch.get_num_threads())


# ---- qgemm: the weight in tiles of 64 output columns (csrc/README.md)


def _tiles(parts: Parts, spec: Spec, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """The native view of a tiled weight; holds addresses, keeps nothing alive."""
    return native().Tiles(groupwise.shape(native(), spec, *shape, dtype), *groupwise.plain(parts))


def _tile(parts: Parts, spec: Spec) -> Parts:
    parts = {name: t.contiguous() for name, t in parts.items()}
    n, k = parts["codes"].shape
    tiles, groups = -(-n // TILE), spec.groups(k)
    empty = native().Tiles(groupwise.shape(native(), spec, n, k, torch.float32), 0, 0, 0)
    stored: file_layouts.Stored = {
        "codes": (torch.uint8, (empty.code_bytes(),)),
        "scale": (spec.scale_dtype, (tiles, groups, TILE)),
    }
    if not spec.symmetric:
        stored["zero"] = (torch.uint8, (tiles, groups, TILE))
    tiled = _together(stored)
    if n % TILE:  # scales of rows that do not exist
        for part in tiled.keys() - {"codes"}:
            tiled[part][-1].zero_()
    handle = _tiles(tiled, spec, (n, k), torch.float32)
    handle.fill(isa(), *groupwise.plain(parts), torch.get_num_threads())
    return tiled


def _together(stored: file_layouts.Stored) -> Parts:
    """Uninitialized parts in one place: scales in small pages of their own cost a product of 4096 x
    4096 in 4 bits, read from memory, 17 % of its time."""
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in stored.items()}
    rooms = [-(-size // 64) * 64 for size in nbytes.values()]
    place = torch.split(memory.host((sum(rooms),), torch.uint8), rooms)
    return {
        name: room[: nbytes[name]].view(dtype).view(shape)
        for (name, (dtype, shape)), room in zip(stored.items(), place, strict=True)
    }


def _untile(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    groups = (shape[0], spec.groups(shape[1]))
    plain = {
        "codes": memory.host(shape, torch.uint8),
        "scale": torch.empty(groups, dtype=spec.scale_dtype),
    }
    if not spec.symmetric:
        plain["zero"] = torch.empty(groups, dtype=torch.uint8)
    handle = _tiles(parts, spec, shape, torch.float32)
    handle.read(isa(), *groupwise.plain(plain), torch.get_num_threads())
    return plain


def _bound(weight: Weight) -> tuple[Any, int]:
    """The native weight and the instruction set, looked up once per weight."""
    if weight.handle is None:
        weight.handle = (_tiles(weight.parts, weight.spec, weight.shape, weight.dtype), isa())
    handle: tuple[Any, int] = weight.handle
    return handle


EXACT, FAST, ROUNDED = range(3)  # HalWay


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, way: int = EXACT) -> None:
    tiles, level = _bound(weight)
    bias = None if bias is None else bias.contiguous()
    at, dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    threads = torch.get_num_threads()
    tiles.gemm(level, x.data_ptr(), x.shape[0], at, dtype, out.data_ptr(), threads, way)


def _qgemm_fast(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    _qgemm(x, weight, bias, out, FAST)


def _qgemm_rounded(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to bf16 on the way, scales and all, as a dense model would hold it."""
    _qgemm(x, weight, bias, out, ROUNDED)


#: Most rows of products with 8-bit activations. AMX: 1.3 to 1.5 times as fast as others from 256 to
#: 2048 rows in groups of 128, no faster in smaller ones. Elsewhere without AVX-512: 2.4 (AVX2) to 5
#: times as fast.
FAST_ROWS = {"amx": BUCKETS[-1], "avx512vnni": 8} | dict.fromkeys(
    ("avxvnni", "avx2", "neon_i8mm", "neon_dot"), BUCKETS[-1]
)


def _fast(case: Case) -> str | None:
    """Integer dot products, where they win."""
    if case.act is None:
        return "exact: prepare(..., act=) allows 8-bit activations"
    level, width = isas()[isa()], case.spec.width(case.k)
    if level not in FAST_ROWS:
        return "no integer dot products on this instruction set"
    most = 16 if level == "amx" and width < 128 else FAST_ROWS[level]
    if Spec("s8", case.act.group).width(case.k) != width:
        return f"activations need groups of {width}, like the weight"
    if width * 127 * case.spec.max_level >= 1 << 31:
        return "sums of a group may not fit 32 bits"
    rows = case.m // case.experts  # of an expert, on average
    return None if rows <= most else f"m > {most}: cpu.qgemm is as fast and exact"


def _qgemm_grouped(
    x: Tensor, weight: Weight, offsets: Tensor, out: Tensor, way: int = EXACT
) -> None:
    tiles, level = _bound(weight)
    offsets = offsets.contiguous()
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0] or sorted(ends) != ends:
        raise ValueError(f"offsets must rise from 0 to {x.shape[0]}, not {ends}")
    args = (x.data_ptr(), offsets.data_ptr(), weight.experts, out.data_ptr())
    tiles.gemm_grouped(level, *args, torch.get_num_threads(), way)


def _qgemm_grouped_fast(x: Tensor, weight: Weight, offsets: Tensor, out: Tensor) -> None:
    _qgemm_grouped(x, weight, offsets, out, FAST)


def _many_rows(case: Case) -> str | None:
    """Where exact products are hardly faster than torch's dense one, and rounded ones are.

    Times as fast as that, 4096 x 4096, 4 bits, one thread, exact and rounded: groups of 16 1.33
    and 1.98 at m = 32; of 32 1.95 and 2.03 at 64, 1.27 and 1.82 at 128; of 64 1.18 and 1.52 at
    256, 1.04 and 1.42 at 512; of 128 1.23 and 1.41 at 512, 1.09 and 1.21 at 1024. From 6 bits on
    1.06 and 1.38 at 512. 768 x 768, which a dense product has in the L2: 1.25 and 1.27 at 128,
    .91 and 1.09 at 256.
    """
    if case.dtype != torch.bfloat16 or isas()[isa()] != "amx":
        return "not bf16 on AMX: nothing is gained"
    small = case.n * case.k <= 1 << 20
    rows = 128 if small else 512 if case.spec.bits < 6 else 256
    most = min(max(16, case.spec.width(case.k) ** 2 // 16), rows)
    return None if case.m > most else f"m <= {most}: cpu.qgemm is as fast and exact"


# ---- what stands between products in a decoder block

FEW_ROWS = 16  # more: torch's attention, which blocks over rows


def block_ops() -> BlockOps:
    """The instruction set is looked up here, once: a token of a small model is 60 calls."""
    module, level, threads = native(), isa(), torch.get_num_threads
    empty, empty_like = torch.empty, torch.empty_like

    def norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        (m, k), out = x.shape, empty_like(x)
        at = (x.data_ptr(), groupwise.address(more), weight.data_ptr(), eps, out.data_ptr())
        module.norm(level, m, k, DTYPES[x.dtype], *at, threads())
        return out

    def gate(x: Tensor) -> Tensor:
        m, n = x.shape[0], x.shape[1] // 2
        out = empty(m, n, dtype=x.dtype)
        module.gate(level, m, n, DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), threads())
        return out

    def attend(qkv: Tensor, a: Attention, at: int) -> Tensor:
        m = qkv.shape[0]
        if m > FEW_ROWS:
            return block.attend(qkv, a, at)
        if a.handle is None:
            a.handle = _attention(a, qkv.dtype)
        out = empty(m, a.heads * a.dim, dtype=qkv.dtype)
        a.handle.attend(level, qkv.data_ptr(), m, at, out.data_ptr(), threads())
        return out

    return BlockOps(norm, gate, attend, _chain)


def _attention(a: Attention, dtype: torch.dtype) -> Any:
    shape = (a.heads, a.kv_heads, a.dim, a.length, DTYPES[dtype], a.eps, a.scale)
    tables = (a.q_norm, a.k_norm, a.cos, a.sin, a.keys, a.values)
    return native().Attention(*shape, *map(groupwise.address, tables))


WAYS = {_qgemm: EXACT, _qgemm_fast: FAST, _qgemm_rounded: ROUNDED}


def _product(linear: Linear) -> Any:
    weight, bias = linear
    dtype = 0 if bias is None else DTYPES[bias.dtype]
    way = WAYS[weight.kernel(1).fn]
    return native().Product(_bound(weight)[0], way, groupwise.address(bias), dtype)


def _chain(blocks: Sequence[Block], eps: float) -> Step | None:
    """One native call a token. Kept alive: the tensors at whose addresses it reads."""
    dtype, k = blocks[0].norm.dtype, blocks[0].norm.shape[0]
    if not all(_chains(block, dtype, k) for block in blocks):
        return None
    chain, threads = native().Chain(eps), torch.get_num_threads
    kept: list[object] = [*blocks]
    for b in blocks:
        handle = _attention(b.attention, dtype)
        at = (b.norm.data_ptr(), b.next_norm.data_ptr())
        ours = [_product(linear) for linear in (b.qkv, b.out, b.gate_up, b.down)]
        chain.add(ours[0], handle, ours[1], at[0], ours[2], ours[3], at[1])
        kept += [t for w, _ in (b.qkv, b.out, b.gate_up, b.down) for t in w.parts.values()]
    level = _bound(blocks[0].qkv[0])[1]

    def step(stream: Tensor, x: Tensor, at: int, kept: list[object] = kept) -> None:
        chain.row(level, stream.data_ptr(), x.data_ptr(), at, threads())

    return step


def _chains(b: Block, dtype: torch.dtype, k: int) -> bool:
    """Whether a block's products are ours, in shapes and a dtype that fit together."""
    a, inner = b.attention, b.down[0].shape[1]
    rows = (a.heads + 2 * a.kv_heads) * a.dim
    wanted = ((rows, k), (k, a.heads * a.dim), (2 * inner, k), (k, inner))
    products = zip((b.qkv, b.out, b.gate_up, b.down), wanted, strict=True)
    return all(t.dtype == dtype for t in (b.norm, b.next_norm, a.keys)) and all(
        w.shape == shape
        and w.dtype == dtype
        and w.experts == 1
        and w.perm is None
        and w.kernel(1).fn in WAYS
        and (bias is None or bias.is_contiguous())
        for (w, bias), shape in products
    )


#: Units of the arithmetic probe a thread: a millisecond on AMX, tens without.
PROBED = 32


def probes() -> Probes:
    def read(data: Tensor) -> None:
        native().probe_read(isa(), data.data_ptr(), data.numel(), torch.get_num_threads())

    def peak() -> int:
        threads = torch.get_num_threads()
        return int(native().probe_peak(isa(), PROBED * threads, threads))

    return Probes(read, peak)


LAYOUTS = (Layout("cpu.tiles", lambda spec, n, k: None, _tile, _untile, TILE, memory=memory.pages),)

KERNELS = (
    *groupwise.rows(NAME, native, _where),
    *groupwise.packing(NAME, _repack),
    Kernel("cpu.qgemm_fast", "qgemm", _qgemm_fast, _fast, "cpu.tiles"),
    Kernel("cpu.qgemm_rounded", "qgemm", _qgemm_rounded, _many_rows, "cpu.tiles"),
    Kernel("cpu.qgemm", "qgemm", _qgemm, layout="cpu.tiles"),
    Kernel("cpu.qgemm_grouped_fast", "qgemm_grouped", _qgemm_grouped_fast, _fast, "cpu.tiles"),
    Kernel("cpu.qgemm_grouped", "qgemm_grouped", _qgemm_grouped, layout="cpu.tiles"),
)
