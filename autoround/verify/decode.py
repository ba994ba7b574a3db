# SPDX-License-Identifier: Apache-2.0
"""What every format's reader makes of its tensors, from the formats' own formulas alone.

Nothing here is shared with the writers (`autoround.formats`, `hal.layout`): a mistake there does
not cancel itself here. Sources: formats.md 0.4 (stream), 2 (GPTQ), 3 (AWQ), 4 (compressed-tensors),
5 (MLX).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Numbers:
    """A weight ``[N, K]`` as codes: ``scale[n, g] * (codes[n, k] - zero[n, g])``, g = groups[k].

    ``stored``: the codes u8 [N, K], or rows of words that are their stream, i32 [N, K bits / 32].
    ``scale`` [N, G] as stored; ``zero`` i16 [N, G]; ``groups`` i64 [K]. ``biases`` [N, G] where
    readers add them: ``scale * code + bias``, zero = -bias / scale.
    """

    bits: int
    stored: Tensor
    scale: Tensor
    zero: Tensor
    groups: Tensor
    biases: Tensor | None = None

    @property
    def words(self) -> Tensor | None:
        """The codes as rows of words; None where they are not stored so."""
        return None if self.stored.dtype == torch.uint8 else self.stored

    @cached_property
    def codes(self) -> Tensor:
        """u8 [N, K]."""
        return self.stored if self.words is None else stream(self.words, self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], len(self.groups)

    def start(self) -> Tensor:
        """What code 0 stands for, f32 [N, G]."""
        return -self.scale.float() * self.zero if self.biases is None else self.biases.float()

    def weight(self) -> Tensor:
        """f32 [N, K]."""
        n, k = self.shape
        count = self.scale.shape[1]
        scale, zero = self.scale.float(), self.zero.float()
        if k % count == 0 and torch.equal(self.groups, torch.arange(k) // (k // count)):
            levels = self.codes.view(n, count, -1).float() - zero[..., None]
            return (levels * scale[..., None]).view(n, k)
        return scale[:, self.groups] * (self.codes.float() - zero[:, self.groups])

    @property
    def symmetric(self) -> bool:
        return bool((self.zero == 1 << (self.bits - 1)).all())


def stream(words: Tensor, bits: int) -> Tensor:
    """Codes u8 ``[R, C]`` of rows of words of any integer dtype: least significant bits first."""
    raw = words.contiguous().view(torch.uint8)
    rows = raw.shape[0]
    if bits in (2, 4, 8):
        cut = [raw >> at & (1 << bits) - 1 for at in range(0, 8, bits)]
        return torch.stack(cut, dim=-1).view(rows, -1)
    runs = raw.view(rows, -1, bits)  # 8 codes in so many bytes
    cut = []
    for at in range(0, 8 * bits, bits):
        byte, shift = divmod(at, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code = code | runs[..., byte + 1] << (8 - shift)
        cut.append(code & (1 << bits) - 1)
    return torch.stack(cut, dim=-1).view(rows, -1)


def packed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `stream`: rows of bytes u8 [R, C bits / 8] of codes u8 [R, C]."""
    runs = codes.reshape(codes.shape[0], -1, 8)  # 8 codes in so many bytes
    raw = torch.zeros(*runs.shape[:2], bits, dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        raw[..., byte] |= runs[..., i] << shift
        if shift + bits > 8:
            raw[..., byte + 1] |= runs[..., i] >> (8 - shift)
    return raw.flatten(1)


def gptq(parts: Parts, minus_one: bool) -> Numbers:
    """qweight [K b / 32, N], qzeros [G, N b / 32], scales [G, N], g_idx [K] where given."""
    scale = parts["scales"].t()
    n = scale.shape[0]
    bits = 32 * parts["qzeros"].shape[1] // n
    words = parts["qweight"].t().contiguous()
    zero = stream(parts["qzeros"], bits).t().to(torch.int16) + minus_one
    k = 32 * words.shape[1] // bits
    return Numbers(bits, words, scale, zero, _groups(k, scale, parts.get("g_idx")))


def awq(parts: Parts) -> Numbers:
    """qweight [K, N / 8], qzeros [G, N / 8]: nibble k of a word is column 0 2 4 6 1 3 5 7 [k]."""
    scale = parts["scales"].t()
    codes, zero = (_awq(parts[name]) for name in ("qweight", "qzeros"))
    return Numbers(4, codes, scale, zero.to(torch.int16), _groups(codes.shape[1], scale, None))


def _awq(words: Tensor) -> Tensor:
    """``[R, W]`` i32 -> u8 [8 W, R]: bytes are turned first, half as many as codes."""
    rows, count = words.shape
    raw = words.contiguous().view(torch.uint8).view(rows, count, 4).permute(1, 2, 0).contiguous()
    columns = torch.empty(count, 8, rows, dtype=torch.uint8)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        columns[:, column] = raw[:, nibble // 2] >> 4 * (nibble % 2) & 15
    return columns.view(8 * count, rows)


def compressed(parts: Parts) -> Numbers:
    """weight_packed [N, K b / 32] or weight i8 [N, K]; zero points packed along N."""
    scale = parts["weight_scale"]
    if "weight" in parts:
        stored, bits = (parts["weight"].to(torch.int16) + 128).to(torch.uint8), 8
        k = stored.shape[1]
    else:
        stored, k = parts["weight_packed"], int(parts["weight_shape"][1])
        bits = 32 * stored.shape[1] // k
    if "weight_zero_point" in parts and parts["weight_zero_point"].dtype == torch.int8:
        zero = parts["weight_zero_point"].to(torch.int16) + (1 << (bits - 1))
    elif "weight_zero_point" in parts:
        zero = stream(parts["weight_zero_point"].t(), bits).t().to(torch.int16)
    else:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int16)
    return Numbers(bits, stored, scale, zero, _groups(k, scale, parts.get("weight_g_idx")))


def canonical(parts: Parts, bits: int, k: int) -> Numbers:
    """codes [N, K b / 32], scale [N, G], zero u8 [N, G], perm [K]: stored column -> column."""
    stored, scale = parts["codes"], parts["scale"]
    groups = _groups(k, scale, None)
    if "perm" in parts:
        back = parts["perm"].long().argsort()
        stored, groups = stream(stored, bits)[:, back], groups[back]
    if "zero" in parts:
        zero = parts["zero"].to(torch.int16)
    else:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int16)
    return Numbers(bits, stored, scale, zero, groups)


def mlx(parts: Parts, group: int) -> Numbers:
    """weight u32 [N, K b / 32], scales and biases [N, G]."""
    scale, biases = parts["scales"], parts["biases"]
    words, k = parts["weight"].view(torch.int32), scale.shape[1] * group
    bits = 32 * words.shape[1] // k
    zero = (-biases.float() / scale.float()).round()
    zero = zero.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, 1 << 14).to(torch.int16)
    return Numbers(bits, words, scale, zero, _groups(k, scale, None), biases)


def _groups(k: int, scale: Tensor, g_idx: Tensor | None) -> Tensor:
    """The group of every column: given, or equal runs of columns."""
    return torch.arange(k) // -(-k // scale.shape[1]) if g_idx is None else g_idx.long()
