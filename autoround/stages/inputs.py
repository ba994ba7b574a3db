# SPDX-License-Identifier: Apache-2.0
"""What reaches the weights of a block, and what the block's output owes to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from autoround.stages.products import short_factors
from autoround.stages.task import BlockTask, Call, hidden, per_size

#: Least correlation between a nudge of a layer's output and the block's answer to it.
TIED = 0.7
#: Size of the nudge, as a share of the output's own root mean square.
NUDGE = 0.1
#: Rows and columns of a product of inputs that are summed together.
TILE = 512


@dataclass(frozen=True, slots=True)
class Moments:
    """``h = X^T X [K, K]`` f32 of a layer's inputs X on the quantized chain, and ``miss = M^T X``.

    M is what has to be made up for: ``of_output`` false, the input's ``F - X`` with F the input on
    the float chain (``[K, K]``); true, what the layer's output lacks (``[N, K]``).
    """

    h: Tensor
    miss: Tensor
    of_output: bool


class _Reached(Exception):
    """The input was seen; the rest of the block need not run."""


def dataflow(task: BlockTask, indices: Sequence[int]) -> list[list[str]]:
    """Layers in the order in which the block uses them, those with one and the same input together.

    Weights that are not the 2-D parameter of a module of their own (fused experts), and those that
    these samples do not reach, are left out.
    """
    assert task.x is not None
    groups: list[tuple[Tensor, list[str]]] = []

    def seen(name: str, x: Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        elif all(name not in names for _, names in groups):
            groups.append((x, [name]))

    with torch.no_grad(), watching(task, task.own, seen):
        task.forward(task.x.gather(indices), {})
    return [names for _, names in groups]


def gain(
    task: BlockTask, name: str, weights: Mapping[str, Tensor], indices: Sequence[int]
) -> Tensor | None:
    """``[N]``: how far each of the block's outputs follows the same output of a layer.

    1 where a layer adds to the residual stream, other values where a norm comes after. None where
    they are not tied one to one: found by a small random nudge of the layer's output.
    """
    assert task.x is not None
    call = task.x.gather(indices)
    nudges: list[Tensor] = []

    def push(_: object, __: object, out: Tensor) -> Tensor:
        size = NUDGE * out.float().pow(2).mean().sqrt()
        generator = torch.Generator().manual_seed(0)  # the CPU's: the same numbers on every device
        noise = torch.randn(out.shape, generator=generator).to(out.device) * size
        nudges.append(noise.to(out.dtype))
        return out + nudges[-1]

    with torch.no_grad():
        before = hidden(task.forward(call, weights)).float()
        handle = task.owner(name).register_forward_hook(push)
        try:
            after = hidden(task.forward(call, weights)).float()
        finally:
            handle.remove()
    if len(nudges) != 1 or nudges[0].shape != before.shape:
        return None
    moved, nudge = (after - before).flatten(0, -2), nudges[0].float().flatten(0, -2)
    found = (moved * nudge).sum(0) / nudge.pow(2).sum(0)
    tied = F.cosine_similarity(moved.flatten(), (nudge * found).flatten(), dim=0)
    usable = found.isfinite().all() and found.abs().min() > 0.05 * found.abs().mean()
    return found if usable and tied > TIED else None


def moments(
    task: BlockTask,
    name: str,
    weights: Mapping[str, Tensor],
    batches: Sequence[Sequence[int]],
    gain: Tensor | None,
) -> Moments | None:
    """Moments of one layer over batches of samples; ``weights`` stand for the block's own.

    With ``gain``, what the layer's output lacks is the block's output error over the gain, and each
    position counts as a share of the block's output there (`per_size`). None where the samples
    never reach the layer.
    """
    assert task.x is not None
    assert task.floats is not None
    assert task.y is not None
    h: Tensor | None = None
    miss: Tensor | None = None
    for batch in batches:
        x, out = _input(task, name, task.x.gather(batch), weights, whole=gain is not None)
        if x is None:
            continue
        if gain is not None:
            target = task.target(batch).float()
            shares = per_size(target).flatten(0, -2)
            lack = (target - hidden(out).float()).flatten(0, -2) / gain * shares
            x = x * shares
        else:
            f, _ = _input(task, name, task.floats.gather(batch), {}, whole=False)
            # A router may send other tokens here on the float chain; then there is no telling.
            lack = f - x if f is not None and f.shape == x.shape else torch.zeros_like(x)
        if h is None or miss is None:
            h, miss = (
                x.new_zeros(n, x.shape[1], dtype=torch.float32) for n in (x.shape[1], lack.shape[1])
            )
        x = x.float()
        _add_squares(h, x)
        _add_products(miss, lack.float(), x)
    if h is None or miss is None:
        return None
    return Moments(_mirrored(h), miss, gain is not None)


@dataclass(frozen=True, slots=True)
class ExpertMoments:
    """``h [E, K, K]`` f32 = X^T X of what the router sends to each expert, ``tokens [E]`` of it,
    and ``together [K, K]`` of all ``routed`` tokens."""

    h: Tensor
    tokens: Tensor
    together: Tensor
    routed: int


def expert_moments(
    task: BlockTask,
    name: str,
    weights: Mapping[str, Tensor],
    batches: Sequence[Sequence[int]],
    experts: range,
) -> ExpertMoments | None:
    """Moments of some experts of a fused weight, seen in the grouped products that it goes into
    (or the batched ones of models that give every expert every token).

    None where the model multiplies in another way: then there is no telling.
    """
    assert task.x is not None
    owner, leaf = task.owner(name), name.rpartition(".")[2]
    fused = [key for key, p in owner._parameters.items() if p is not None and p.ndim == 3]
    (_, k), device = task.layers[name].w.shape, task.layers[name].w.device
    h, together = (torch.zeros(*of, k, k, device=device) for of in ((len(experts),), ()))
    tokens = torch.zeros(len(experts), dtype=torch.long, device=device)
    routed = 0
    for batch in batches:
        call = task.x.gather(batch)
        with torch.no_grad(), _GroupedProducts(owner) as products:
            task.forward(call, weights)
        if len(products.seen) != len(fused):
            return None
        x, ends = products.seen[fused.index(leaf)]
        if x.shape[1] != k or len(ends) != owner.get_parameter(leaf).shape[0]:
            return None
        bounds = [0, *ends.tolist()]
        x = x.float()
        _add_squares(together, x[: bounds[-1]])
        routed += bounds[-1]
        for at, expert in enumerate(experts):
            own = x[bounds[expert] : bounds[expert + 1]]
            if len(own):
                _add_squares(h[at], own)
                tokens[at] += len(own)
    for found in (*h, together):
        _mirrored(found)
    return ExpertMoments(h, tokens, together, routed)


class _GroupedProducts(TorchFunctionMode):
    """Inputs, sorted by expert, and their ends, of every grouped or batched product inside a
    module."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._owner, self._inside = owner, False
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        def mark(inside: bool) -> Callable[..., None]:
            def hook(*_: object) -> None:
                self._inside = inside

            return hook

        self._handles = [
            self._owner.register_forward_pre_hook(mark(True)),
            self._owner.register_forward_hook(mark(False)),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named, name = kwargs or {}, str(getattr(function, "__name__", function))
        if self._inside and "grouped_mm" in name:
            self.seen.append((args[0], named["offs"] if "offs" in named else args[2]))
        elif self._inside and name == "bmm":
            self.seen.append(_sorted_rows(args[0]))
        return function(*args, **named)


def _sorted_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [E, T, K]`` as a grouped product has it: rows that are not zero, and each expert's end.
    Where every expert is given every token (Llama 4), those of others are zero."""
    used = x.any(dim=-1)
    return x[used], used.sum(1).cumsum(0)


def _input(
    task: BlockTask, name: str, call: Call, weights: Mapping[str, Tensor], whole: bool
) -> tuple[Tensor | None, object]:
    """``[T, K]`` that a layer is given, and the block's output; not ``whole``: no further."""
    found: list[Tensor] = []

    def seen(_: str, x: Tensor) -> None:
        found.append(x)
        if not whole:
            raise _Reached

    out: object = None
    with torch.no_grad(), watching(task, [name], seen), suppress(_Reached):
        out = task.forward(call, weights)
    return (found[0].flatten(0, -2) if found else None), out


@contextmanager
def watching(
    task: BlockTask, names: Sequence[str], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Tell ``seen`` what each layer is given while the block runs."""

    def watch(name: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            if args:
                seen(name, args[0])

        return hook

    handles = [task.owner(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``, all f32, tile by tile: at K = 4096 in .6 of the time of one product."""
    with short_factors():
        for i in range(0, total.shape[0], TILE):
            for j in range(0, total.shape[1], TILE):
                _tile(total, i, j).addmm_(a[:, i : i + TILE].t(), b[:, j : j + TILE])


def _add_squares(total: Tensor, x: Tensor) -> None:
    """``total += x^T x``, the tiles on the diagonal and right of it (.37 of the time); `_mirrored`
    makes the others."""
    for i in range(0, len(total), TILE):
        _add_products(total[i : i + TILE, i:], x[:, i : i + TILE], x[:, i:])


def _mirrored(total: Tensor) -> Tensor:
    """The whole symmetric matrix, in place, of its upper triangle."""
    for i in range(0, len(total), TILE):
        own = _tile(total, i, i)
        own.copy_(own.triu() + own.triu(1).t())
        for j in range(i + TILE, len(total), TILE):
            _tile(total, j, i).copy_(_tile(total, i, j).t())
    return total


def _tile(x: Tensor, i: int, j: int) -> Tensor:
    return x[i : i + TILE, j : j + TILE]
