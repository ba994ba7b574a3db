# SPDX-License-Identifier: Apache-2.0
"""What every format's reader makes of its tensors, from the formats' own formulas alone.

Nothing here is shared with the writers (`autoround.formats`, `hal.layout`): a mistake there does
not cancel itself here. Sources: formats.md 0.4 (stream), 2 (GPTQ), 3 (AWQ), 4 (compressed-tensors),
5 (MLX).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Numbers:
    """A weight ``[N, K]`` as codes: ``scale[n, g] * (codes[n, k] - zero[n, g])``, g = groups[k].

    ``codes`` u8 [N, K]; ``scale`` [N, G] as stored; ``zero`` i16 [N, G]; ``groups`` i64 [K].
    ``biases`` [N, G] where readers add them: ``scale * code + bias``, zero = -bias / scale.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    groups: Tensor
    biases: Tensor | None = None

    def weight(self) -> Tensor:
        """f32 [N, K]."""
        scale = self.scale.float()[:, self.groups]
        if self.biases is not None:
            return scale * self.codes.float() + self.biases.float()[:, self.groups]
        return scale * (self.codes.float() - self.zero.float()[:, self.groups])

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


def gptq(parts: Parts, minus_one: bool) -> Numbers:
    """qweight [K b / 32, N], qzeros [G, N b / 32], scales [G, N], g_idx [K] where given."""
    scale = parts["scales"].t()
    n = scale.shape[0]
    bits = 32 * parts["qzeros"].shape[1] // n
    codes = stream(parts["qweight"].t(), bits)
    zero = stream(parts["qzeros"], bits).t().to(torch.int16) + minus_one
    return Numbers(bits, codes, scale, zero, _groups(codes, scale, parts.get("g_idx")))


def awq(parts: Parts) -> Numbers:
    """qweight [K, N / 8], qzeros [G, N / 8]: nibble k of a word is column 0 2 4 6 1 3 5 7 [k]."""
    scale = parts["scales"].t()
    codes, zero = (_awq(parts[name]).t() for name in ("qweight", "qzeros"))
    return Numbers(4, codes, scale, zero.to(torch.int16), _groups(codes, scale, None))


def _awq(words: Tensor) -> Tensor:
    nibbles = stream(words, 4).view(words.shape[0], -1, 8)
    columns = torch.empty_like(nibbles)
    columns[..., [0, 2, 4, 6, 1, 3, 5, 7]] = nibbles
    return columns.view(words.shape[0], -1)


def compressed(parts: Parts) -> Numbers:
    """weight_packed [N, K b / 32] or weight i8 [N, K]; zero points packed along N."""
    scale = parts["weight_scale"]
    if "weight" in parts:
        codes, bits = (parts["weight"].to(torch.int16) + 128).to(torch.uint8), 8
    else:
        bits = 32 * parts["weight_packed"].shape[1] // int(parts["weight_shape"][1])
        codes = stream(parts["weight_packed"], bits)
    if "weight_zero_point" in parts:
        zero = stream(parts["weight_zero_point"].t(), bits).t().to(torch.int16)
    else:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int16)
    groups = _groups(codes, scale, parts.get("weight_g_idx"))
    return Numbers(bits, codes, scale, zero, groups)


def canonical(parts: Parts, bits: int, k: int) -> Numbers:
    """codes [N, K b / 32], scale [N, G], zero u8 [N, G], perm [K]: stored column -> column."""
    codes, scale = stream(parts["codes"], bits), parts["scale"]
    groups = _groups(codes, scale, None)
    if "perm" in parts:
        back = parts["perm"].long().argsort()
        codes, groups = codes[:, back], groups[back]
    if "zero" in parts:
        zero = parts["zero"].to(torch.int16)
    else:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int16)
    return Numbers(bits, codes, scale, zero, groups)


def mlx(parts: Parts, group: int) -> Numbers:
    """weight u32 [N, K b / 32], scales and biases [N, G]."""
    scale, biases = parts["scales"], parts["biases"]
    bits = 32 * parts["weight"].shape[1] // (scale.shape[1] * group)
    codes = stream(parts["weight"], bits)
    zero = (-biases.float() / scale.float()).round()
    zero = zero.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, 1 << 14).to(torch.int16)
    return Numbers(bits, codes, scale, zero, _groups(codes, scale, None), biases)


def _groups(codes: Tensor, scale: Tensor, g_idx: Tensor | None) -> Tensor:
    if g_idx is not None:
        return g_idx.long()
    k, count = codes.shape[1], scale.shape[1]
    return torch.arange(k) // -(-k // count)
