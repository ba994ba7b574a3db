# SPDX-License-Identifier: Apache-2.0
"""What stands between the products of a decoder block: norm, attention over a cache, gate.

Not verbs: they know nothing of quantization, and serve `autoround.inference.decoder` so that a
token costs its products and little else. Results are rounded to the tensors' dtype where the plain
model rounds them; sums are in f32 and their order is the implementation's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hal import config

if TYPE_CHECKING:
    from hal.plan import Weight

#: Positions that lie together in a cache of keys.
BLOCK = 32


@dataclass(slots=True)
class Attention:
    """The attention of one layer and its cache. Float = f32, bf16 or f16, one for all.

    ``cos``, ``sin [L, D]``: rotary tables of every position. ``q_norm``, ``k_norm [D]``: of each
    head, or None. L is a multiple of 32; D too, at most 256. The caches begin as zeros: keys
    ``[KV, L / 32, D, 32]``, values ``[KV, L, D]``.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    handle: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.length % BLOCK or self.dim % BLOCK or self.dim > 256:
            raise ValueError(f"length {self.length}, dim {self.dim}: multiples of 32, dim <= 256")
        self.keys = self.cos.new_zeros(self.kv_heads, self.length // BLOCK, self.dim, BLOCK)
        self.values = self.cos.new_zeros(self.kv_heads, self.length, self.dim)

    @property
    def length(self) -> int:
        """Positions the cache holds."""
        return self.cos.shape[0]


#: A product: its weight, and a bias or None.
Linear = tuple["Weight", Tensor | None]
#: (stream [1, K], x [1, K], at): see `BlockOps.chain`.
Step = Callable[[Tensor, Tensor, int], None]


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block. ``norm [K]``: behind attention; ``next_norm [K]``: behind the block."""

    qkv: Linear
    attention: Attention
    out: Linear
    norm: Tensor
    gate_up: Linear
    down: Linear
    next_norm: Tensor


def unchained(blocks: Sequence[Block], eps: float) -> None:
    """`BlockOps.chain` of a backend that takes the steps one by one."""


@dataclass(frozen=True, slots=True)
class BlockOps:
    """The functions of one backend.

    ``norm(x, more, weight, eps)``: ``x [M, K] += more`` in place (None = nothing), then the root
    mean square norm of the rows times ``weight [K]``, ``[M, K]``.
    ``gate(x)``: ``x [M, 2 N] -> silu(x[:, :N]) * x[:, N:]``.
    ``attend(qkv, a, at)``: rows ``[M, (H + 2 KV) * D]`` enter the cache at positions ``at`` on and
    attend to themselves and all before them: ``[M, H * D]``.
    ``chain(blocks, eps)``: all of it for one token as one call, or None where that cannot be. The
    call takes the stream and its norm and leaves in both what they are behind the last block, the
    same bits as step by step. It keeps the weights where they are: `hal.settle` comes before.
    """

    norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    gate: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Attention, int], Tensor]
    chain: Callable[[Sequence[Block], float], Step | None] = unchained


def block_ops(device: torch.device) -> BlockOps:
    """The functions for a device: its backend's own, else the reference."""
    from hal.backends import serving

    wanted = config.backend()
    for backend in serving(device.type):
        if not config.excludes(wanted, backend.NAME):
            return backend.block_ops()
    raise ValueError(f"HAL_BACKEND={wanted} has nothing for {device}")


def norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """`BlockOps.norm` in torch, operation for operation what transformers' RMSNorm does."""
    if more is not None:
        x += more
    return _normed(x, weight, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gate(x: Tensor) -> Tensor:
    """`BlockOps.gate` in torch."""
    first, second = x.chunk(2, -1)
    return F.silu(first) * second


def attend(qkv: Tensor, a: Attention, at: int) -> Tensor:
    """`BlockOps.attend` in torch."""
    m, end = qkv.shape[0], at + qkv.shape[0]
    rows = qkv.view(m, a.heads + 2 * a.kv_heads, a.dim)
    q, k, v = torch.split(rows, [a.heads, a.kv_heads, a.kv_heads], 1)
    q, k = (x if w is None else _normed(x, w, a.eps) for x, w in ((q, a.q_norm), (k, a.k_norm)))
    cos, sin = a.cos[at:end, None], a.sin[at:end, None]
    q, k = (x * cos + _turned(x) * sin for x in (q, k))
    where = torch.arange(at, end, device=k.device)
    a.keys[:, where // BLOCK, :, where % BLOCK] = k
    a.values[:, at:end] = v.transpose(0, 1)
    keys = a.keys.transpose(2, 3).reshape(a.kv_heads, a.length, a.dim)[:, :end]
    mask = None
    if at and m > 1:
        mask = torch.ones(m, end, dtype=torch.bool, device=k.device).tril(at)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        a.values[None, :, :end],
        attn_mask=mask,
        is_causal=mask is None and m > 1,
        scale=a.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(m, a.heads * a.dim)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
