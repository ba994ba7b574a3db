# SPDX-License-Identifier: Apache-2.0
"""How a step follows the gradient: its sign (SignRound's own), with momentum, or Adam.

The last two need the gradient itself, in closed form (algorithms.md 1.3), where the sign comes out
of one fused verb.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import hal
from autoround.stages.task import LayerTask


class Steps(Protocol):
    """Steps of all layers of one block; what a layer remembers of earlier ones is kept inside."""

    def take(self, layer: LayerTask, grad: Tensor, lr_v: float, lr_range: float) -> None:
        """Move a layer's parameters against ``grad [N, K]`` = dL/d(rounded weight), in place."""


class Signed:
    """``p -= lr sign(gradient)``."""

    def take(self, layer: LayerTask, grad: Tensor, lr_v: float, lr_range: float) -> None:
        hal.qdq_step_(
            layer.ready, layer.w, grad.contiguous(), layer.spec, lr_v=lr_v, lr_range=lr_range
        )


class Remembering:
    """``p -= lr direction(gradient, memory)``, a memory for every tensor."""

    def __init__(self, direction: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
        self._direction = direction
        self._memories: dict[int, tuple[list[Tensor], ...]] = {}

    def take(self, layer: LayerTask, grad: Tensor, lr_v: float, lr_range: float) -> None:
        p = layer.ready
        assert p.v is not None
        memories = self._memories.setdefault(id(layer), ([], [], []))
        found = gradients(layer, grad)
        v, lo, hi = (self._direction(g, m) for g, m in zip(found, memories, strict=True))
        p.v.sub_(v * lr_v)
        p.lo.sub_(lo * lr_range).clamp_(0, 1)
        p.hi.sub_(hi * lr_range).clamp_(0, 1)


def momentum(share: float) -> Remembering:
    """Signs of the gradients' running sum, of which ``share`` is kept at every step."""

    def direction(gradient: Tensor, memory: list[Tensor]) -> Tensor:
        memory[:] = [memory[0] * share + gradient if memory else gradient]
        return torch.sign(memory[0])

    return Remembering(direction)


def adam() -> Remembering:
    """Adam (Kingma and Ba 2015) with its usual constants: 0.9, 0.999, 1e-8."""

    def direction(gradient: Tensor, memory: list[Tensor]) -> Tensor:
        mean, square, count = memory or [gradient * 0, gradient * 0, torch.zeros(())]
        mean, square = mean.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.001)
        memory[:] = [mean, square, count + 1]
        t = float(memory[2])
        size = torch.sqrt(square / (1 - 0.999**t)) + 1e-8
        return torch.div(mean / (1 - 0.9**t), size)

    return Remembering(direction)


def gradients(layer: LayerTask, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dv ``[N, K]``, dL/dlo and dL/dhi ``[N, G]`` f32; rounding counts as the identity."""
    p, spec, w = layer.ready, layer.spec, layer.w.float()
    assert p.v is not None
    k = w.shape[1]
    parts = hal.quantize(w, p, spec).parts
    scale, most = parts["scale"].float(), float(spec.max_level)
    zero = parts["zero"].float() if "zero" in parts else torch.full_like(scale, spec.half)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(spec.width(k), 1)[:, :k]

    def sums(x: Tensor) -> Tensor:
        pad = spec.groups(k) * spec.width(k) - k
        return torch.nn.functional.pad(x, (0, pad)).view(len(x), spec.groups(k), -1).sum(-1)

    g, ratio = grad.float(), w / spread(scale)
    wanted = (ratio + p.v).round() + spread(zero)
    inside = (wanted >= 0) & (wanted <= most)
    level = parts["codes"].float() - spread(zero)
    by_scale = sums(g * (level - torch.where(inside, ratio, 0.0)))
    low, high = -(p.amin * p.lo), p.amax * p.hi
    if spec.symmetric:
        half = float(spec.half)
        by_lo = torch.where(high < low, by_scale, torch.where(high == low, -by_scale, 0.0))
        by_hi = torch.where(high < low, 0.0, -by_scale)
        return spread(scale) * g * inside, by_lo * -p.amin / half, by_hi * p.amax / half
    by_zero = -(scale * sums(torch.where(inside, 0.0, g)))
    by_scale = by_scale - by_zero * (low / (scale * scale))
    by_lo = -p.amin * by_scale / most - by_zero * p.amin / scale
    return spread(scale) * g * inside, by_lo, p.amax * by_scale / most
