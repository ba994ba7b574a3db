# SPDX-License-Identifier: Apache-2.0
"""File layouts: how codes, scales and zero points lie in memory. Bit permutations, nothing else.

Every packed integer layout but AWQ is one primitive: 32 consecutive values become ``bits`` 32-bit
words, least significant bit first, values may straddle words (formats.md 0.4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hal.spec import Spec

Parts = dict[str, Tensor]
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Unpack = Callable[[Parts, Spec, tuple[int, int]], Parts]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """``values [R, C]`` u8 -> ``[R, C * bits / 32]`` i32; C must be a multiple of 32."""
    rows, cols = values.shape
    groups = values.view(rows, cols // 32, 32).to(torch.int64)
    words = torch.zeros(rows, cols // 32, bits, dtype=torch.int64, device=values.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= groups[..., i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= groups[..., i] >> (32 - shift)
    return as_i32(words.view(rows, -1))


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_stream`: ``[R, W]`` i32 -> ``[R, W * 32 / bits]`` u8."""
    rows = words.shape[0]
    groups = words.view(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    values = torch.empty(rows, groups.shape[1], 32, dtype=torch.int64, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = groups[..., word] >> shift
        if shift + bits > 32:
            value = value | groups[..., word + 1] << (32 - shift)
        values[..., i] = value & ((1 << bits) - 1)
    return values.view(rows, -1).to(torch.uint8)


def pack_awq(values: Tensor) -> Tensor:
    """``values [R, C]`` u8 of 4 bits -> ``[R, C / 8]`` i32 in AWQ's nibble order."""
    groups = values.view(values.shape[0], -1, 8).to(torch.int64)
    words = sum(groups[..., column] << 4 * i for i, column in enumerate(AWQ_ORDER))
    assert isinstance(words, Tensor)
    return as_i32(words)


def unpack_awq(words: Tensor) -> Tensor:
    """Inverse of `pack_awq`."""
    bits = words.to(torch.int64)
    values = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for i, column in enumerate(AWQ_ORDER):
        values[..., column] = (bits >> 4 * i & 15).to(torch.uint8)
    return values.flatten(1)


def as_i32(words: Tensor) -> Tensor:
    """32-bit words held in i64, as i32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _t(x: Tensor) -> Tensor:
    return x.t().contiguous()


def _zero_levels(parts: Parts, spec: Spec) -> Tensor:
    """Zero level of every group, ``[N, G]`` u8, also for symmetric codes."""
    return (
        parts["zero"]
        if "zero" in parts
        else torch.full_like(parts["scale"], spec.half, dtype=torch.uint8)
    )


def _plain(codes: Tensor, scale: Tensor, zero: Tensor, spec: Spec) -> Parts:
    parts = {"codes": codes, "scale": scale}
    return parts if spec.symmetric else {**parts, "zero": zero}


def _gptq_zeros(parts: Parts, spec: Spec, offset: int) -> Tensor:
    if spec.symmetric:  # the same words in every group: a row of them is packed once
        n, groups = parts["scale"].shape
        row = _constant_row(spec.half - offset, n, spec.bits).to(parts["scale"].device)
        return row.expand(groups, -1).contiguous()
    field = (parts["zero"].to(torch.int16) - offset).clamp(0).to(torch.uint8)
    return pack_stream(_t(field), spec.bits)


@cache
def _constant_row(value: int, n: int, bits: int) -> Tensor:
    return pack_stream(torch.full((1, n), value, dtype=torch.uint8), bits)


def _turn_gptq(offset: int) -> Callable[[Tensor, Parts, Spec], Parts]:
    """From layout stream: a column of these words is a row of those."""

    def turned(words: Tensor, parts: Parts, spec: Spec) -> Parts:
        return {
            "qweight": words,
            "qzeros": _gptq_zeros(parts, spec, offset),
            "scales": _t(parts["scale"]),
        }

    return turned


def _pack_gptq(offset: int) -> Callable[[Parts, Spec], Parts]:
    turned = _turn_gptq(offset)
    return lambda parts, spec: turned(_t(pack_stream(parts["codes"], spec.bits)), parts, spec)


def _unpack_gptq(offset: int) -> Unpack:
    def unpack(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
        codes = unpack_stream(_t(parts["qweight"]), spec.bits)
        zero = _t(unpack_stream(parts["qzeros"], spec.bits)) + offset
        return _plain(codes, _t(parts["scales"]), zero, spec)

    return unpack


def _pack_rows(parts: Parts, spec: Spec) -> Parts:
    kept = {name: t for name, t in parts.items() if name != "codes"}
    return {"qweight": pack_stream(parts["codes"], spec.bits), **kept}


def _unpack_rows(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    kept = {name: t for name, t in parts.items() if name != "qweight"}
    return {"codes": unpack_stream(parts["qweight"], spec.bits), **kept}


def _pack_awq(parts: Parts, spec: Spec) -> Parts:
    return {
        "qweight": pack_awq(_t(parts["codes"])),
        "qzeros": pack_awq(_t(_zero_levels(parts, spec))),
        "scales": _t(parts["scale"]),
    }


def _unpack_awq(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    codes, zero = _t(unpack_awq(parts["qweight"])), _t(unpack_awq(parts["qzeros"]))
    return _plain(codes, _t(parts["scales"]), zero, spec)


def _fits_stream(spec: Spec, n: int, k: int) -> str | None:
    if n % 32 or k % 32:
        return f"[{n}, {k}] is not a multiple of 32 in both directions"
    return None


def _fits_rows(spec: Spec, n: int, k: int) -> str | None:
    return f"{k} columns are not a multiple of 32" if k % 32 else None


def _fits_gptq_minus_one(spec: Spec, n: int, k: int) -> str | None:
    if not spec.symmetric:
        return "a zero level of 0 cannot be stored as zero - 1; use gptq_raw or awq"
    return _fits_stream(spec, n, k)


def _fits_awq(spec: Spec, n: int, k: int) -> str | None:
    if spec.bits != 4:
        return f"awq holds 4 bits, not {spec.bits}"
    if n % 8 or k % spec.width(k):
        return f"[{n}, {k}]: awq needs N % 8 == 0 and K a multiple of the group {spec.group}"
    return None


def _plain_parts(spec: Spec, n: int, k: int) -> Stored:
    groups = (n, spec.groups(k))
    parts: Stored = {"codes": (torch.uint8, (n, k)), "scale": (spec.scale_dtype, groups)}
    return parts if spec.symmetric else {**parts, "zero": (torch.uint8, groups)}


def _gptq_parts(spec: Spec, n: int, k: int) -> Stored:
    groups, bits = spec.groups(k), spec.bits
    return {
        "qweight": (torch.int32, (k * bits // 32, n)),
        "qzeros": (torch.int32, (groups, n * bits // 32)),
        "scales": (spec.scale_dtype, (groups, n)),
    }


def _rows_parts(spec: Spec, n: int, k: int) -> Stored:
    kept = {name: part for name, part in _plain_parts(spec, n, k).items() if name != "codes"}
    return {"qweight": (torch.int32, (n, k * spec.bits // 32)), **kept}


def _awq_parts(spec: Spec, n: int, k: int) -> Stored:
    groups = spec.groups(k)
    return {
        "qweight": (torch.int32, (k, n // 8)),
        "qzeros": (torch.int32, (groups, n // 8)),
        "scales": (spec.scale_dtype, (groups, n)),
    }


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of storing plain parts, as pure functions that are each other's inverse.

    ``fits(spec, N, K)`` answers None or the reason it cannot hold them; ``pack(plain, spec)``;
    ``unpack(parts, spec, (N, K))``. Native layouts of a backend are rows of the same kind.
    ``stored(spec, N, K)``: dtype and shape of what a file layout's ``pack`` returns.
    ``turned(words, stream, spec)``: ``pack`` from the parts of layout stream and its words
    transposed, where that is all there is to do.
    ``rows``: how many rows of the weight stay together, so that parts of two weights put one after
    the other are the parts of the joined weight; 0 = that does not hold. ``memory(bytes)``: a
    better place for the weights of a model than one tensor each (`hal.settle`), u8.
    """

    name: str
    fits: Callable[[Spec, int, int], str | None]
    pack: Callable[[Parts, Spec], Parts]
    unpack: Unpack
    rows: int = 0
    stored: Callable[[Spec, int, int], Stored] = _plain_parts
    memory: Callable[[int], Tensor] | None = None
    turned: Callable[[Tensor, Parts, Spec], Parts] | None = None


LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout("plain", lambda spec, n, k: None, lambda p, spec: p, lambda p, spec, shape: p, 1),
        # int32 [K * b / 32, N], zeros stored minus one (GPTQ v1)
        Layout(
            "gptq",
            _fits_gptq_minus_one,
            _pack_gptq(1),
            _unpack_gptq(1),
            0,
            _gptq_parts,
            turned=_turn_gptq(1),
        ),
        # the same with zeros stored as they are (GPTQ v2, auto_round)
        Layout(
            "gptq_raw",
            _fits_stream,
            _pack_gptq(0),
            _unpack_gptq(0),
            0,
            _gptq_parts,
            turned=_turn_gptq(0),
        ),
        # int32 [N, K * b / 32], scales and zeros as in plain (compressed-tensors, MLX, our own)
        Layout("stream", _fits_rows, _pack_rows, _unpack_rows, 1, _rows_parts),
        # int32 [K, N / 8], nibble order 0 2 4 6 1 3 5 7
        Layout("awq", _fits_awq, _pack_awq, _unpack_awq, 0, _awq_parts),
    )
}


# ---- what native layouts of several backends share


def _pad_words(parts: Parts, spec: Spec) -> Parts:
    padded = F.pad(parts["codes"], (0, -parts["codes"].shape[1] % 32))
    kept = {name: t.contiguous() for name, t in parts.items()}
    return {**kept, "codes": pack_stream(padded, spec.bits)}


def _cut_words(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    return {**parts, "codes": unpack_stream(parts["codes"], spec.bits)[:, : shape[1]].contiguous()}


#: ``stream`` for any number of columns, and rows that may be joined: codes i32, scale, zero.
WORDS = Layout("words", lambda spec, n, k: None, _pad_words, _cut_words, 1)
