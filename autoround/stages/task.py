# SPDX-License-Identifier: Apache-2.0
"""The work on one block, as the stages see it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hal
from hal.device import gathered

#: Positions of a sample.
EVERY, BUT_LAST = slice(None), slice(-1)


class Call(Protocol):
    """How the model calls the block for a batch of samples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Samples(Protocol):
    """Block inputs of all calibration samples."""

    @property
    def indices(self) -> tuple[int, ...]: ...

    def batches(self, indices: Iterable[int], size: int) -> list[tuple[int, ...]]:
        """Groups of at most ``size`` samples that can run together."""

    def gather(self, indices: Sequence[int]) -> Call: ...


@dataclass(slots=True)
class LayerTask:
    """One weight of the block. ``restore`` gives the parameter's own shape back.

    ``w [N, K]`` is what will be rounded: the float weight, or what a stage has put in its place;
    ``dtype`` is the float weight's.
    """

    spec: hal.Spec
    w: Tensor
    restore: Callable[[Tensor], Tensor]
    params: hal.Params | None = None
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.w.dtype

    @property
    def ready(self) -> hal.Params:
        """The parameters, once a stage has set them."""
        assert self.params is not None
        return self.params


@dataclass(slots=True)
class BlockTask:
    """One block on its way: layers by parameter name inside the block, inputs, float outputs.

    ``x``: inputs of the chain the block is tuned on; ``floats``: those of the float chain; ``y``:
    the float block's hidden output of each sample. All None when the recipe needs no data.
    ``held``: samples that only judge. ``fixed``: rounded weights that no later stage changes.
    ``tokens``: fused weight -> how many tokens the router sent to each of its experts.
    """

    index: int
    module: nn.Module
    layers: dict[str, LayerTask]
    amp: Callable[[], AbstractContextManager[Any]]
    x: Samples | None = None
    y: Mapping[int, Tensor] | None = None
    floats: Samples | None = None
    held: tuple[int, ...] = ()
    fixed: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[int, ...]:
        """The samples to measure on: those held out, or all."""
        assert self.x is not None
        return self.held or self.x.indices

    @property
    def seen(self) -> tuple[int, ...]:
        """The samples to tune on."""
        assert self.x is not None
        return tuple(i for i in self.x.indices if i not in self.held)

    @property
    def own(self) -> list[str]:
        """Layers that are the 2-D parameter of a module of their own, unlike fused experts."""
        return [name for name in self.layers if self.module.get_parameter(name).ndim == 2]

    def owner(self, name: str) -> nn.Module:
        """The module whose parameter a layer is."""
        return self.module.get_submodule(name.rpartition(".")[0])

    def forward(self, call: Call, weights: Mapping[str, Tensor]) -> Any:
        """The block's output with ``weights [N, K]`` in the place of its own."""
        own = {}
        for name, w in weights.items():
            layer = self.layers[name]
            own[name] = layer.restore(w.to(layer.dtype))
        with self.amp():
            return functional_call(self.module, own, call.args, call.kwargs)

    def target(self, indices: Sequence[int]) -> Tensor:
        """The float block's hidden outputs of some samples, where the block is computed."""
        assert self.y is not None
        return gathered([self.y[i] for i in indices], next(iter(self.layers.values())).w.device)

    def loss(
        self,
        indices: Sequence[int],
        weights: Mapping[str, Tensor],
        trim: float = 0.0,
        positions: slice = EVERY,
    ) -> Tensor:
        """Mean squared error to the float block over a batch of samples, f32.

        ``trim``: the share of elements, those of largest error, that count as no error at all.
        ``positions``: those of a sample that count.
        """
        assert self.x is not None
        out = hidden(self.forward(self.x.gather(indices), weights))[..., positions, :]
        target = self.target(indices)[..., positions, :]
        if not trim:
            return F.mse_loss(out.float(), target.float())
        error = (out.float() - target.float()).flatten()
        worst = error.detach().abs().topk(max(1, int(trim * error.numel()))).indices
        return error.index_fill(0, worst, 0.0).pow(2).mean()


def per_size(state: Tensor) -> Tensor:
    """``[..., 1]`` f32: 1 / the root mean square of each position of a hidden state; 0 for zeros.

    What comes after a block divides by that (RMS and layer norms), so an error counts as a share of
    it. A few positions of a language model are hundreds of times as large as all others (Sun et
    al., Massive Activations, 2024), and would else be all that is seen.
    """
    square = state.float().pow(2).mean(-1, keepdim=True)
    return torch.where(square > 0, square.rsqrt(), torch.zeros_like(square))


def relative_error(state: Tensor, target: Tensor) -> Tensor:
    """Mean over the positions of ||state - target||^2 / ||target||^2, f32."""
    error = (state.float() - target.float()) * per_size(target)
    return error.pow(2).mean()


def hidden(output: Any) -> Tensor:
    """The hidden state in whatever a block returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


class Stage(Protocol):
    """One step. Configured in ``__init__``, keeps no state between blocks."""

    def run(self, task: BlockTask) -> None: ...


def chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of at most ``size``."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
