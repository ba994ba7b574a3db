# SPDX-License-Identifier: Apache-2.0
"""Experts that a checkpoint stores as one tensor, seen as the linear layers that they are.

Readers of quantized models know experts by number, one linear layer each, so that is how they are
quantized, named and written. Only names and shapes decide what is a stack.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: End of a stack's key -> the layers of one expert that it holds, in order of their rows. The names
#: are those that vLLM gives them.
LEAVES = {
    "input_linear.weight": ("experts.{}.w1", "experts.{}.w3"),  # Granite
    "output_linear.weight": ("experts.{}.w2",),
    "experts.gate_up_proj": ("experts.{}.gate_proj", "experts.{}.up_proj"),
    "experts.down_proj": ("experts.{}.down_proj",),
}
#: Stacks that take what experts are given -> those beside them that give what they put out.
PAIRS = {"input_linear.weight": "output_linear.weight", "experts.gate_up_proj": "experts.down_proj"}
_EXPERT = re.compile(r"^(.*?)(experts\.)(\d+)(\..+)\.weight$")
#: Model types whose gate and up rows alternate.
ALTERNATE = frozenset({"gpt_oss"})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slab:
    """One expert's linear layer ``[N, K]`` in a stack; ``rows``: start, stop, step of those of the
    expert."""

    stack: str
    expert: int
    rows: tuple[int, int, int]
    transposed: bool

    def of(self, expert: Tensor) -> Tensor:
        """The layer, from its expert's part ``[rows, K]`` of the stack (``[K, rows]`` where it is
        transposed). A view."""
        return (expert.t() if self.transposed else expert)[slice(*self.rows)]


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor ``[E, N, K]``, or ``[E, K, N]`` where ``transposed``.

    ``layers``: keys that the layers would have if they were stored one by one, expert after expert,
    -> where they are. ``alternating``: gate and up row by row, rather than one after the other.
    """

    key: str
    shape: Shape
    transposed: bool
    alternating: bool
    layers: Mapping[str, Slab]

    @property
    def size(self) -> tuple[int, int]:
        """``(E N, K)``: all experts below each other."""
        experts, n, k = self.shape
        return (experts * k, n) if self.transposed else (experts * n, k)

    @property
    def layer(self) -> tuple[int, int]:
        """``(N, K)`` of each of the layers."""
        return self.size[0] // len(self.layers), self.size[1]


def find_stacks(shapes: Mapping[str, Shape], model_type: str) -> dict[str, Stack]:
    """All stacks among tensors of these names and shapes, by key."""
    found: dict[str, Stack] = {}
    for key in shapes:
        for leaf, other in PAIRS.items():
            pair = (key, key.removesuffix(leaf) + other)
            if not key.endswith(leaf) or pair[1] not in shapes:
                continue
            transposed = is_transposed(*(shapes[one] for one in pair))
            if transposed is None:
                continue
            for one, end in zip(pair, (leaf, other), strict=True):
                alternating = model_type in ALTERNATE and len(LEAVES[end]) > 1
                found[one] = _stack(one, end, shapes[one], transposed, alternating)
    return found


def is_transposed(up: Shape, down: Shape) -> bool | None:
    """Whether two stacks are ``[E, K, 2 I]`` and ``[E, I, K]``; False: ``[E, 2 I, K]`` and
    ``[E, K, I]``; None: neither. No sizes are both."""
    if len(up) != 3 or len(down) != 3 or up[0] != down[0] or 0 in (*up, *down):
        return None
    if up[1] == 2 * down[2] and up[2] == down[1]:
        return False
    return True if up[2] == 2 * down[1] and up[1] == down[2] else None


def _stack(key: str, leaf: str, shape: Shape, transposed: bool, alternating: bool) -> Stack:
    names, rows = LEAVES[leaf], shape[2 if transposed else 1]
    count, own = len(names), rows // len(names)
    where = [
        (at, rows, count) if alternating else (at * own, (at + 1) * own, 1) for at in range(count)
    ]
    prefix = key.removesuffix(leaf)
    layers = {
        f"{prefix}{name.format(expert)}.weight": Slab(key, expert, part, transposed)
        for expert in range(shape[0])
        for name, part in zip(names, where, strict=True)
    }
    return Stack(key, shape, transposed, alternating, layers)


def regroup(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys of single experts' layers -> by the key of the stack that would hold them, in its order.
    Those that belong to none are left out."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for key in keys:
        if match := _EXPERT.match(key):
            before, experts, number, name = match.groups()
            for leaf, names in LEAVES.items():
                if (wanted := f"{experts}{{}}{name}") in names:
                    row = int(number), names.index(wanted), key
                    found.setdefault(before + leaf, []).append(row)
    return {stack: [key for _, _, key in sorted(rows)] for stack, rows in found.items()}


def kind_of(config: Mapping[str, Any]) -> str:
    """The model type that decides how text is read: the inner one where there are several."""
    text = config.get("text_config")
    return str((text if isinstance(text, dict) else config).get("model_type", ""))
