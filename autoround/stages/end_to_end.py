# SPDX-License-Identifier: Apache-2.0
"""After the last block: the scales of all weights at once, toward what the float model says.

Codes and zero levels stay; norms and biases, which files keep as they are, move with the scales.
What a block's own loss cannot see is how its errors and later ones meet in the model's output (the
second phase of EfficientQAT, Chen et al. 2024, there with the loss of the text and here with the
float model as the teacher). A step holds one block's weights: blocks are run under checkpoints, and
make their weights when they are called.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoround.stages.signround import LOSS_SCALE, Cyclic
from autoround.stages.task import chunks
from hal import QTensor, Spec

#: Elements of a weight that are worked on at a time.
PIECE = 1 << 24
#: Elements of the logits of a micro-batch, the teacher's among them: 512 MB in f32.
LOGITS = 1 << 27
#: Shares of the change that are tried on the samples held out.
SHARES = (1.0, 0.5, 0.25)
#: Samples of a step, and tokens that go through the model together at most.
BATCH, TOKENS = 4, 2048


@dataclass(slots=True)
class Scaled:
    """A rounded weight ``[N, K]`` whose scales may move.

    ``start [N, G]`` f32: its scales as they are stored. ``read`` gives its codes and zero levels,
    ``restore`` the parameter's own shape. ``change [N, G]`` f32: relative to ``start``.
    """

    spec: Spec
    shape: tuple[int, int]
    dtype: torch.dtype
    start: Tensor
    read: Callable[[], QTensor]
    restore: Callable[[Tensor], Tensor]
    change: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.change = torch.zeros_like(self.start).requires_grad_()

    def stored(self) -> Tensor:
        """The scales ``[N, G]`` as a file will have them: never 0, and never of another sign."""
        moved = (self.start * (1 + self.change.detach())).to(self.spec.scale_dtype)
        legal = moved.isfinite() & (moved.float() * self.start.sign() >= self.spec.min_scale)
        return torch.where(legal, moved, self.start.to(self.spec.scale_dtype))

    def weight(self) -> Tensor:
        """The parameter as a reader of the file will have it; differentiable in ``change``, for
        which rounding to the file's dtype counts as the identity."""
        with torch.autocast(self.change.device.type, enabled=False):
            return self.restore(_Dequantized.apply(self.change, self))  # type: ignore[no-untyped-call]

    def levels(self, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Codes above zero of some rows, f32."""
        codes = parts["codes"][rows].float()
        if "zero" not in parts:
            return codes - self.spec.half
        return codes - self.spread(parts["zero"][rows].float())

    def spread(self, x: Tensor) -> Tensor:
        """``[n, G] -> [n, K]``."""
        return x.repeat_interleave(self.spec.width(self.shape[1]), 1)[:, : self.shape[1]]

    def sums(self, x: Tensor) -> Tensor:
        """``[n, K] -> [n, G]``."""
        width, groups = self.spec.width(self.shape[1]), self.spec.groups(self.shape[1])
        x = F.pad(x, (0, groups * width - x.shape[1]))
        return x.view(len(x), groups, width).sum(-1)

    def pieces(self) -> Iterator[slice]:
        """Rows that are worked on at a time."""
        size = max(1, PIECE // self.shape[1])
        yield from (slice(at, at + size) for at in range(0, self.shape[0], size))


@dataclass(slots=True)
class Vector:
    """A parameter of one dimension (norms, biases), which files keep as it is, and may move.

    ``start``: its value; ``change`` f32: in units of the mean size of its elements.
    """

    start: Tensor
    change: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.change = torch.zeros_like(self.start, dtype=torch.float32).requires_grad_()

    def _moved(self) -> Tensor:
        return self.start.float() + self.start.float().abs().mean() * self.change

    def stored(self) -> Tensor:
        """The value as a file will have it."""
        moved = self._moved().detach().to(self.start.dtype)
        return torch.where(moved.isfinite(), moved, self.start)

    def weight(self) -> Tensor:
        """The same; differentiable in ``change``, for which rounding counts as the identity."""
        moved = self._moved()
        return (moved + (self.stored().float() - moved).detach()).to(self.start.dtype)


class _Dequantized(torch.autograd.Function):
    """``[N, K]`` in the weight's dtype; backward, a group's scale gets sum(gradient * level)."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, of: Scaled) -> Tensor:
        parts, scale = of.read().parts, of.stored().float()
        ctx.of, ctx.parts = of, {k: v for k, v in parts.items() if k != "scale"}
        out = torch.empty(of.shape, dtype=of.dtype, device=change.device)
        for rows in of.pieces():
            out[rows] = of.levels(parts, rows) * of.spread(scale[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        of: Scaled = ctx.of
        out = torch.empty_like(of.start)
        for rows in of.pieces():
            out[rows] = of.sums(grads[0][rows].float() * of.levels(ctx.parts, rows))
        return out * of.start, None


class _Divergence(torch.autograd.Function):
    """Mean KL(softmax(other) || softmax(own)) over all but the last dimension; its gradient is the
    difference of the two, which is all that is kept."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor) -> Tensor:
        p, q = (F.log_softmax(x, -1, dtype=torch.float32) for x in (other, own))
        apart = p - q
        p.exp_()
        count = q.numel() // q.shape[-1]
        ctx.save_for_backward(q.exp_().sub_(p).div_(count).to(own.dtype))
        return apart.mul_(p).sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None


@dataclass(slots=True)
class ModelTask:
    """The rounded model: everything in it is real, but modules make their own weights.

    ``owners``: blocks and other modules, each with what moves in it by parameter name inside it.
    ``head``: the module that makes logits, None where there is none; ``projection``: its weight,
    where that is rounded, a linear layer's then. ``ids [n, T]``; ``teacher``: for each of them what
    the float model hands to its head ``[1, T', H]``, at every `stride`-th position, or its last
    hidden state. ``held``: rows of ``ids`` that only judge. ``amp``: the arithmetic of forwards.
    """

    model: Any
    owners: Sequence[tuple[nn.Module, Mapping[str, Scaled | Vector]]]
    head: nn.Module | None
    projection: Scaled | None
    ids: Tensor
    teacher: Sequence[Tensor]
    held: tuple[int, ...]
    amp: Callable[[], AbstractContextManager[Any]]

    @property
    def moving(self) -> list[Scaled | Vector]:
        """All that moves."""
        found = [weight for _, weights in self.owners for weight in weights.values()]
        return found if self.projection is None else [*found, self.projection]

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Mean over the positions of some samples: KL(float || rounded) of the next token in nats,
        or the squared error of the hidden state, as a share of its mean square."""
        device = self.moving[0].start.device
        ids = self.ids[[*rows]].to(device)
        teacher = torch.cat([self.teacher[i] for i in rows]).to(device)
        with ExitStack() as stack:
            for module, weights in self.owners:
                stack.enter_context(_weightless(module, weights))
            stack.enter_context(self.amp())
            if self.head is None:
                out = self.model(input_ids=ids)[0].float()
                missed: Tensor = (out - teacher.float()).square().mean()
                return missed / teacher.float().square().mean()
            every = stride(self.ids.shape[1], self.head)
            stack.enter_context(_beside(self.head, self.projection, teacher, every))
            own, other = self.model(input_ids=ids, use_cache=False).logits.chunk(2)
        divergence: Tensor = _Divergence.apply(own, other.detach())  # type: ignore[no-untyped-call]
        return divergence


def stride(tokens: int, head: nn.Module) -> int:
    """Every how many positions of a sample count: all, where their logits take little memory."""
    size: int = head.weight.shape[0]  # type: ignore[index, assignment]
    return -(-2 * tokens * size // LOGITS)


@contextmanager
def _weightless(module: nn.Module, weights: Mapping[str, Scaled | Vector]) -> Iterator[None]:
    """A module whose weights exist while it runs, forward and once more for the gradient."""
    original, shadowed = module.forward, module.__dict__.get("forward")
    inside = False

    def _run(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            own = {name: weight.weight() for name, weight in weights.items()}
            return functional_call(module, own, args, kwargs)
        finally:
            inside = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if inside:
            return original(*args, **kwargs)
        return checkpoint(_run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    with _forward(module, forward, shadowed):
        yield


@contextmanager
def _beside(
    head: nn.Module, projection: Scaled | None, teacher: Tensor, every: int
) -> Iterator[None]:
    """The head puts out the logits of its input, then the float model's: whatever the model does
    to logits it does to both."""
    original, shadowed = head.forward, head.__dict__.get("forward")

    def forward(x: Tensor) -> Tensor:
        own = rounded(x[:, ::every])
        with torch.no_grad():
            other = original(teacher)
        return torch.cat((own, other))

    def rounded(x: Tensor) -> Tensor:
        if projection is None:
            logits: Tensor = original(x)
            return logits
        return F.linear(x, projection.weight(), head.bias)  # type: ignore[arg-type]

    with _forward(head, forward, shadowed):
        yield


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any], before: Any) -> Iterator[None]:
    """An instance's own attribute shadows the method."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """``steps`` of Adam on ``batch`` samples each; of what they change, the share that serves the
    samples held out best is kept, or nothing.

    ``rate``: the relative step at its largest, after ``warm`` steps, for 2 bits; it ends at 0. At
    most ``tokens`` go through the model together. ``on_step(t, loss)`` is told of every step.
    """

    steps: int
    on_step: Callable[[int, float], None]
    seed: int
    batch: int = BATCH
    tokens: int = TOKENS
    rate: float = 3e-3
    warm: int = 5

    def refuse(self, task: ModelTask) -> str | None:
        """Why nothing can be tuned, found by trying one sample."""
        if not task.moving:
            return "nothing in it moves"
        try:
            task.loss(task.held[:1]).backward()  # type: ignore[no-untyped-call]
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"the model takes no gradients ({type(error).__name__}: {error})"[:300]
        return None

    def run(self, task: ModelTask) -> tuple[float, float]:
        """Held-out loss before and after; ``change`` of every weight is what came of it."""
        changes = [weight.change for weight in task.moving]
        optimizer = torch.optim.Adam(changes, betas=(0.9, 0.95), foreach=False)
        bits = min(weight.spec.bits for weight in task.moving if isinstance(weight, Scaled))
        rate = self.rate * 2.0 ** (2 - bits)  # each bit more halves what there is to correct
        size = max(1, self.tokens // task.ids.shape[1])
        seen = [i for i in range(len(task.ids)) if i not in task.held]
        visits = Cyclic(seen, self.batch, Random(f"{self.seed}:end to end"))
        before = _judged(task, size)
        for t in range(self.steps):
            optimizer.param_groups[0]["lr"] = rate * self._share(t)
            optimizer.zero_grad()
            rows, total = visits.next(), 0.0
            for micro in chunks(rows, size):
                loss = task.loss(micro) * (len(micro) / len(rows))
                (loss * LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            for change in changes:
                if change.grad is not None:  # a module that text does not reach has none
                    change.grad.div_(LOSS_SCALE)
            optimizer.step()
            self.on_step(t, total)
        return before, self._settled(task, size, before)

    def _settled(self, task: ModelTask, size: int, before: float) -> float:
        """The least held-out loss, of no change and of shares of the whole: what the steps agreed
        on shrinks with the share, what was noise with its square."""
        whole = [weight.change.detach().clone() for weight in task.moving]
        least, best, first = before, 0.0, math.nan
        for share in SHARES:
            _assign(task, whole, share)
            found = _judged(task, size)
            first = found if math.isnan(first) else first
            if found < least:
                least, best = found, share
        _assign(task, whole, best)
        return least if best else first

    def _share(self, t: int) -> float:
        return min(1.0, (t + 1) / self.warm) * (1 - t / self.steps)


def _assign(task: ModelTask, changes: Sequence[Tensor], share: float) -> None:
    with torch.no_grad():
        for weight, change in zip(task.moving, changes, strict=True):
            weight.change.copy_(change * share if share else torch.zeros_like(change))


def _judged(task: ModelTask, size: int) -> float:
    with torch.no_grad():
        found = [float(task.loss(rows)) * len(rows) for rows in chunks(task.held, size)]
    return sum(found) / len(task.held)
