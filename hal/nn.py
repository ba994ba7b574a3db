# SPDX-License-Identifier: Apache-2.0
"""Modules over `hal.qgemm`, for runtimes that think in modules."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hal.ops import prepare, qgemm, qgemm_grouped, restore
from hal.plan import Weight
from hal.qtensor import QTensor
from hal.spec import Act


def _for_input(w: Weight, x: Tensor) -> Weight:
    """The weight itself, or prepared anew when the device or the dtype of the input changed."""
    if w.dtype == x.dtype and w.device == x.device:
        return w
    return prepare(restore(w), dtype=x.dtype, device=x.device, act=w.act)


class QLinear(nn.Module):
    """``y = x @ w.T + bias`` with a quantized ``w [N, K]``; `load` gives it the weight.

    The weight lives in kernel layout only and is no parameter: ``state_dict`` holds the bias alone.
    """

    def __init__(self, n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = n, k
        # Empty until `load`: model code that initialises child.weight must find a tensor there.
        self.weight: Weight | Tensor = torch.empty(0, dtype=dtype)
        empty = nn.Parameter(torch.empty(n, dtype=dtype), requires_grad=False) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", empty)

    def load(self, q: QTensor, dtype: torch.dtype, *, fast: bool = False) -> None:
        """Prepare ``q [N, K]`` for activations of ``dtype`` on its own device.

        ``fast`` allows products with activations in s8, one scale per group of ``q``.
        """
        act = Act("s8", q.spec.group) if fast else None
        self.weight = prepare(q, dtype=dtype, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K] -> [..., N]``."""
        assert isinstance(self.weight, Weight), "QLinear.load() comes first"
        self.weight = _for_input(self.weight, x)
        return qgemm(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        if isinstance(self.weight, Weight):
            return _describe(self.weight)
        return f"{self.in_features} -> {self.out_features}, empty"


class QExperts(nn.Module):
    """Routed experts ``down(act(gate_up(x)))`` over two grouped weights, tokens sorted by expert.

    ``act``: ``[T, 2 I] -> [T, I]`` (or ``[T, I] -> [T, I]`` without a gate). ``biases``: none, or
    those of gate_up and of down, ``[E, rows]``, under the names they get as parameters.
    """

    def __init__(
        self,
        experts: int,
        act: Callable[[Tensor], Tensor],
        biases: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.act = experts, act
        self._biases = tuple(biases or ())
        for name, bias in (biases or {}).items():
            self.register_parameter(name, bias)
        self.up: Weight | None = None
        self.down: Weight | None = None

    def load(self, up: QTensor, down: QTensor, dtype: torch.dtype, *, fast: bool = False) -> None:
        """``up [E * 2 I, K]`` (rows as ``act`` takes them) and ``down [E * K, I]``.

        ``fast`` as for `QLinear.load`.
        """

        def ready(q: QTensor) -> Weight:
            return prepare(q, dtype=dtype, act=Act("s8", q.spec.group) if fast else None)

        self.up, self.down = ready(up), ready(down)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``x [T, K]``; ``index``, ``weights [T, k]``: each token's experts and their shares."""
        order = index.flatten().argsort(stable=True)
        tokens = order // index.shape[1]
        counts = torch.bincount(index.flatten(), minlength=self.experts)[: self.experts]
        used = int(counts.sum())  # an index of E means "no expert" and sorts last
        order, tokens = order[:used], tokens[:used]
        y = self.sorted(x[tokens], counts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, tokens, y.to(x.dtype))

    def sorted(self, x: Tensor, counts: Tensor) -> Tensor:
        """``x [T, K]`` sorted by expert, ``counts [E]`` rows of each -> ``[T, K]``."""
        assert self.up is not None, "QExperts.load() comes first"
        assert self.down is not None
        self.up, self.down = _for_input(self.up, x), _for_input(self.down, x)
        offsets = torch.zeros(self.experts + 1, dtype=torch.int32, device=x.device)
        offsets[1:] = counts.cumsum(0)
        up, down = qgemm_grouped(x, self.up, offsets), self.down
        if not self._biases:
            return qgemm_grouped(self.act(up), down, offsets)
        own = torch.repeat_interleave(counts, output_size=len(x))
        of_up, of_down = (self.get_parameter(name)[own] for name in self._biases)
        return qgemm_grouped(self.act(up + of_up), down, offsets) + of_down

    def extra_repr(self) -> str:
        return ", ".join(_describe(w) for w in (self.up, self.down) if w)


def _describe(w: Weight) -> str:
    names = ", ".join(dict.fromkeys(row.name for _, row in w.kernels))
    return f"{list(w.shape)}, {w.spec}, {names}"
