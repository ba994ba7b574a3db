# SPDX-License-Identifier: Apache-2.0
"""Consecutive blocks tuned as one: gradients pass through all, the loss is at the last one's end.

Between two blocks of a unit the model does not run, so what it does there must not matter: it hands
on what a block puts out as it is, and gives the next one nothing that depends on it (`unfit`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autoround.models import Call
from autoround.models.samples import READ_ONLY_DICTS, alike
from autoround.stages import BlockTask
from autoround.stages.task import hidden

HIDDEN = "hidden_states"


class Joined(nn.ModuleList):
    """Blocks one after the other, called as `joined_call` has it; parameters are ``AT.NAME``."""

    def forward(self, state: Tensor, **given: Any) -> Any:
        """What the last block puts out."""
        out: Any = (state,)
        for at, block in enumerate(self):
            own = {k.partition(".")[2]: v for k, v in given.items() if k.startswith(f"{at}.")}
            if HIDDEN in own:
                out = block(**{**own, HIDDEN: hidden(out)})
            else:
                numbers = sorted((name for name in own if name.isdigit()), key=int)
                args = [own.pop(number) for number in numbers]
                out = block(hidden(out), *args, **own)
        return out


def joined_call(calls: Sequence[Call]) -> Call:
    """The call of blocks that are one module, from each one's own; the hidden state is the
    first's. Of one block: its own call."""
    if len(calls) == 1:
        return calls[0]
    given: dict[str, Any] = {}
    for at, call in enumerate(calls):
        own = call.rest() if call.args else {**call.rest(), HIDDEN: None}  # to be given by its name
        given |= {f"{at}.{name}": value for name, value in own.items()}
    return Call((calls[0].hidden,), given)


@dataclass(slots=True)
class Unit:
    """``parts``: its blocks, in order. ``task``: all of them as one block; the only one's own."""

    parts: Sequence[BlockTask]
    task: BlockTask = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        if len(self.parts) == 1:
            self.task = first
            return
        module = Joined([part.module for part in self.parts])
        layers = {
            f"{at}.{name}": layer
            for at, part in enumerate(self.parts)
            for name, layer in part.layers.items()
        }
        self.task = BlockTask(first.index, module, layers, first.amp)

    @property
    def last(self) -> int:
        """Index of its last block."""
        return self.parts[-1].index


def unfit(
    put_out: Mapping[int, Any], calls: Mapping[int, Call], firsts: Mapping[int, Call]
) -> str | None:
    """Why a block cannot be tuned together with the one before it, or None.

    By sample: what the one before put out, how the model calls this one then, and how it called the
    first of the unit. What is alike for all samples, or for both blocks, does not depend on weights
    of the unit: samples differ in what passes through it.
    """
    one = calls[min(calls)].rest()
    for i, call in calls.items():
        if not alike(call.hidden, hidden(put_out[i])):
            return "the model changes what one puts out before the other is given it"
        first = firsts[i].rest()
        for name, value in call.rest().items():
            if isinstance(value, dict) and name not in READ_ONLY_DICTS:
                return f"they share {name}, which each may write into"
            if not (same(value, one.get(name)) or same(value, first.get(name))):
                return f"{name} may depend on what one of them puts out"
    return None


def differs(calls: Mapping[int, Call], others: Mapping[int, Call]) -> str | None:
    """The name of what a block is given on one chain and not on the other, besides the hidden
    state."""
    for i, call in calls.items():
        wanted = others[i].rest()
        for name, value in call.rest().items():
            if not same(value, wanted.get(name)):
                return name
    return None


def same(a: Any, b: Any) -> bool:
    """Whether nested plain values with tensors are equal; objects of a model's own never are."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and alike(a, b)
    if type(a) in (tuple, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return (a is None or isinstance(a, bool | int | float | str)) and bool(a == b)
