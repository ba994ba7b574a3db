# SPDX-License-Identifier: Apache-2.0
"""SignRound: signed gradient descent on the rounding and the range (Cheng et al., 2023).

The quantizer is not in the autograd graph: the block runs on fake-quantized weights, autograd gives
dL/dW, and `hal.qdq_step_` turns that into the step of the tunable parameters in closed form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

import hal
from autoround.stages.steps import Signed, Steps
from autoround.stages.task import BUT_LAST, BlockTask, chunks

#: Keeps small gradients out of the underflow of half precision; signs do not change.
LOSS_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class SignRound:
    """``iters`` steps on random batches; the parameters of the best step seen are kept.

    Weights that an earlier stage has fixed stay as they are.

    ``lr``, ``minmax_lr``: bits -> initial step, falling linearly to 0. ``on_step(t, loss)`` is told
    of every step. A sample's last position, which foretells nothing in it, does not count. Random
    order depends on ``seed`` and the block only, so a run can be resumed.
    ``widest``: how far a range may grow, 1 in the first paper and 2 on a searched range in the
    second. ``trim``: bits -> share of the block's output, where it is worst, that the loss ignores.
    ``keep_last``: the last step's parameters are kept instead. ``patience``: steps without a new
    best after which the block ends. ``steps``: how a step follows the gradient.
    """

    iters: int
    batch_size: int
    accumulate: int
    lr: Callable[[int], float]
    minmax_lr: Callable[[int], float]
    seed: int
    on_step: Callable[[int, float], None]
    widest: float = 1.0
    trim: Callable[[int], float] = lambda bits: 0.0
    keep_last: bool = False
    patience: int | None = None
    steps: Callable[[], Steps] = Signed

    def run(self, task: BlockTask) -> None:
        layers = {name: task.layers[name] for name in task.layers if name not in task.fixed}
        if not layers:
            return
        for layer in layers.values():
            layer.params = _widened(layer.ready, self.widest)
            layer.params.v = torch.zeros(layer.w.shape, dtype=torch.float32, device=layer.w.device)
        best = {name: _copy(layer.ready) for name, layer in layers.items()}
        fake = {name: torch.empty_like(layer.w) for name, layer in layers.items()}
        visits = Cyclic(task.seen, self.batch_size * self.accumulate, self._random(task.index))
        least, best_at, steps = float("inf"), 0, self.steps()
        for t in range(self.iters):
            loss, grads = self._gradients(task, visits.next(), fake)
            self.on_step(t, loss)
            if loss < least or self.keep_last:
                least, best_at = loss, t
                for name, layer in layers.items():
                    _assign(best[name], layer.ready)
            if self.patience is not None and t - best_at >= self.patience:
                break
            decay = 1 - t / self.iters
            for name, layer in layers.items():
                bits = layer.spec.bits
                rates = self.lr(bits) * decay, self.minmax_lr(bits) / self.widest * decay
                steps.take(layer, grads[name], *rates)
        for name, layer in layers.items():
            _assign(layer.ready, best[name])

    def _random(self, block: int) -> Random:
        return Random(f"{self.seed}:{block}")

    def _gradients(
        self, task: BlockTask, indices: Sequence[int], fake: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss over the step's samples, and dL/dW of every fake-quantized weight."""
        assert task.x is not None
        weights = {}
        for name, out in fake.items():
            layer = task.layers[name]
            rounded = hal.qdq(layer.w, layer.ready, layer.spec, out=out)
            weights[name] = rounded.detach().requires_grad_()
        trim = max(self.trim(task.layers[name].spec.bits) for name in weights)
        total, grads = 0.0, dict.fromkeys(weights, torch.empty(0))
        for micro in chunks(indices, self.batch_size):
            for batch in task.x.batches(micro, self.batch_size):
                share = len(batch) / len(indices)
                loss = task.loss(batch, {**task.fixed, **weights}, trim, BUT_LAST) * share
                total += float(loss.detach())
                found = torch.autograd.grad(loss * LOSS_SCALE, list(weights.values()))
                for name, grad in zip(weights, found, strict=True):
                    grads[name] = grads[name] + grad if grads[name].numel() else grad
        return total, grads


class Cyclic:
    """Batches of a shuffled list, shuffled anew when fewer than a batch are left."""

    def __init__(self, items: Sequence[int], size: int, random: Random) -> None:
        self._items, self._random = list(items), random
        self._size, self._at = min(size, len(items)), len(items)

    def next(self) -> list[int]:
        if self._at + self._size > len(self._items):
            self._random.shuffle(self._items)
            self._at = 0
        self._at += self._size
        return self._items[self._at - self._size : self._at]


def _widened(p: hal.Params, most: float) -> hal.Params:
    """The same range, ``1 / most`` of one that many times as wide: multipliers end at 1."""
    lo, hi = p.lo / most, p.hi / most
    return hal.Params(None, lo, hi, p.amin * most, p.amax * most)


def _copy(p: hal.Params) -> hal.Params:
    v = None if p.v is None else p.v.clone()
    return hal.Params(v, p.lo.clone(), p.hi.clone(), p.amin, p.amax)


def _assign(to: hal.Params, source: hal.Params) -> None:
    if to.v is not None and source.v is not None:
        to.v.copy_(source.v)
    to.lo.copy_(source.lo)
    to.hi.copy_(source.hi)
