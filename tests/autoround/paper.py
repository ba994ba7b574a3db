# SPDX-License-Identifier: Apache-2.0
"""SignRound as the paper has it: plain torch, autograd, straight-through.

It follows algorithms.md 1.2 to 1.5 and shares no code with `hal` or the stage.
"""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from autoround.scheme import Scheme
from autoround.stages import SignRound


class Wrapped:
    """One weight of the reference: V, alpha, beta as leaves; what W becomes, by autograd."""

    def __init__(self, w: Tensor, scheme: Scheme) -> None:
        self.w, self.scheme = w, scheme
        self.groups = w.shape[1] // scheme.group_size
        g = self._grouped(w)
        self.low, self.high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
        self.v = torch.zeros_like(w, requires_grad=True)
        self.alpha = torch.ones(self.low.shape, requires_grad=True)
        self.beta = torch.ones(self.low.shape, requires_grad=True)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.groups, -1)

    def scale_zero(self) -> tuple[Tensor, Tensor]:
        below, above = -self.low * self.alpha, self.high * self.beta
        levels = 2**self.scheme.bits - 1
        if self.scheme.sym:
            sign = torch.where(above < below, 1.0, -1.0)
            s = fp16(sign * torch.maximum(below, above) / 2 ** (self.scheme.bits - 1))
            return s, torch.zeros_like(s)
        s = fp16((above + below) / levels)
        return s, rne(below / s).clamp(0, levels)

    def __call__(self) -> Tensor:
        s, z = (x[..., None] for x in self.scale_zero())
        half = 2 ** (self.scheme.bits - 1)
        least, most = (-half, half - 1) if self.scheme.sym else (0, 2 * half - 1)
        q = (rne(self._grouped(self.w) / s + self._grouped(self.v)) + z).clamp(least, most)
        return (s * (q - z)).view_as(self.w)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.v, self.alpha, self.beta


def rne(x: Tensor) -> Tensor:
    """Rounding, straight-through."""
    return x + (x.round() - x).detach()


def fp16(x: Tensor) -> Tensor:
    """Storage in fp16, straight-through."""
    return x + (x.half().float() - x).detach()


def reference(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    wrapped: dict[str, Wrapped],
    xs: list[Tensor],
    ys: list[Tensor],
    stage: SignRound,
    order: list[list[int]],
) -> list[float]:
    """The loop of algorithms.md 1.5 over ``forward(weights, x)``: the loss of every step; leaves
    end as the best step's, copied before its update."""
    best, kept, losses = float("inf"), dict[str, list[Tensor]](), []
    for t, indices in enumerate(order):
        total = 0.0
        for start in range(0, len(indices), stage.batch_size):
            micro = indices[start : start + stage.batch_size]
            x, y = torch.cat([xs[i] for i in micro]), torch.cat([ys[i] for i in micro])
            out = forward({n: w() for n, w in wrapped.items()}, x)[:, :-1]
            loss = ((out - y[:, :-1]) ** 2).mean() * len(micro) / len(indices)
            (1000 * loss).backward()
            total += loss.item()
        losses.append(total)
        if total < best:
            best = total
            kept = {n: [p.detach().clone() for p in w.leaves] for n, w in wrapped.items()}
        decay = 1 - t / stage.iters
        with torch.no_grad():
            for w in wrapped.values():
                bits = w.scheme.bits
                lr, range_lr = stage.lr(bits) * decay, stage.minmax_lr(bits) * decay
                for p, step in zip(w.leaves, (lr, range_lr, range_lr), strict=True):
                    p -= step * p.grad.sign()
                    p.grad = None
                w.alpha.clamp_(0, 1)
                w.beta.clamp_(0, 1)
    with torch.no_grad():
        for name, w in wrapped.items():
            for p, value in zip(w.leaves, kept[name], strict=True):
                p.copy_(value)
    return losses


def order_of(stage: SignRound, count: int, block: int = 0) -> list[list[int]]:
    """The batches a stage takes, by its own rule: seed and block, reshuffled when short."""
    random, items, batches = Random(f"{stage.seed}:{block}"), list(range(count)), []
    size, at = min(stage.batch_size * stage.accumulate, count), count
    for _ in range(stage.iters):
        if at + size > count:
            random.shuffle(items)
            at = 0
        batches.append(items[at : at + size])
        at += size
    return batches
