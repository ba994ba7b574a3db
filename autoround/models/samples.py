# SPDX-License-Identifier: Apache-2.0
"""Block calls of many samples: equal tensors stored once, compatible samples batched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hal import device as devices

# A dict may be state that blocks write into for later blocks (gemma3n shared_kv_states); a merged
# copy would lose the writes. These are the dicts known to be read only.
READ_ONLY_DICTS = frozenset({"position_embeddings"})


@dataclass(slots=True)
class Call:
    """How the model called a block, for one sample (or one batch of them)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state: the first positional, else `hidden_states`."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def with_hidden(self, hidden: Tensor) -> "Call":
        """The same call with another hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call(self.args, {**self.kwargs, "hidden_states": hidden})

    def rest(self) -> dict[str, Any]:
        """Everything but the hidden state, positionals under their number."""
        named: dict[str, Any] = {str(i): value for i, value in enumerate(self.args) if i}
        return named | {k: v for k, v in self.kwargs.items() if self.args or k != "hidden_states"}


class Samples:
    """One block's calls for many samples; tensors equal to the first sample's are stored once."""

    def __init__(self, calls: Mapping[int, Call], device: torch.device | None = None) -> None:
        """``device``: where the block is computed. Hidden states stay where they are until they are
        gathered, all else goes there at once. None = where the calls are."""
        self._device, moved = device, dict[int, Tensor]()
        self._calls: dict[int, Call] = {}
        self._keys: dict[int, Any] = {}
        first: dict[str, Any] | None = None
        for index, call in calls.items():
            first = first if first is not None else call.rest()
            shared = {name: _share(value, first.get(name)) for name, value in call.rest().items()}
            args = (*call.args[:1], *(shared[str(i)] for i in range(1, len(call.args))))
            kwargs = {name: shared.get(name, value) for name, value in call.kwargs.items()}
            self._calls[index] = Call(args, kwargs)
            if device is not None:
                own = self._calls[index]
                args = (*args[:1], *(_moved(value, device, moved) for value in args[1:]))
                kwargs = {
                    name: value if value is own.hidden else _moved(value, device, moved)
                    for name, value in kwargs.items()
                }
                self._calls[index] = Call(args, kwargs)
            self._keys[index] = _signature(self._calls[index], index)

    @property
    def indices(self) -> tuple[int, ...]:
        """The sample numbers, as given."""
        return tuple(self._calls)

    def call(self, index: int) -> Call:
        """One sample's own call."""
        return self._calls[index]

    def hidden(self, index: int) -> Tensor:
        """One sample's hidden state, usually [1, S, H]."""
        return self._calls[index].hidden

    def set_hidden(self, index: int, hidden: Tensor) -> None:
        """Replace one sample's hidden state; its shape and dtype must stay."""
        self._calls[index] = self._calls[index].with_hidden(hidden)

    def batches(self, indices: Iterable[int], size: int) -> list[tuple[int, ...]]:
        """Groups of at most `size` samples that can be gathered, in the order given."""
        open_groups: dict[Any, list[int]] = {}
        done: list[list[int]] = []
        for index in indices:
            group = open_groups.setdefault(self._keys[index], [])
            if not group:
                done.append(group)
            group.append(index)
            if len(group) >= size:
                del open_groups[self._keys[index]]
        return [tuple(group) for group in done]

    def gather(self, indices: Sequence[int]) -> Call:
        """One call for several samples: hidden states concatenated along dim 0, other tensors
        shared where all are equal and broadcast, else concatenated. Raises ValueError for samples
        of different groups."""
        calls = [self._calls[index] for index in indices]
        device = calls[0].hidden.device if self._device is None else self._device
        if len(calls) == 1:
            return calls[0].with_hidden(devices.moved(calls[0].hidden, device))
        if len({self._keys[index] for index in indices}) != 1:
            raise ValueError(
                f"samples {list(indices)} cannot be batched; group them with batches()"
            )
        rests = [call.rest() for call in calls]
        merged = {name: _merge([rest[name] for rest in rests]) for name in rests[0]}
        hidden = devices.gathered([call.hidden for call in calls], device)
        if calls[0].args:
            args = (hidden, *(merged.pop(str(i)) for i in range(1, len(calls[0].args))))
            return Call(args, merged)
        return Call((), {"hidden_states": hidden, **merged})


def moved(value: Any, device: torch.device) -> Any:
    """Every tensor of a block's output on a device."""
    return _moved(value, device, {})


def _moved(value: Any, device: torch.device, seen: dict[int, Tensor]) -> Any:
    """`value` on a device; one tensor stays one. ``seen`` keeps all that it names alive."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = devices.moved(value, device)
        return seen[id(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device, seen) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, seen) for item in value)
    if isinstance(value, dict):  # in place: a block may write into it for the next
        value.update({key: _moved(item, device, seen) for key, item in value.items()})
    return value


def split(output: Any, n: int) -> list[Any]:
    """Undo `gather` on a block's output: n outputs in the same container; the rest is shared."""
    if n == 1:
        return [output]
    return [_rebuild(output, i, n) for i in range(n)]


def _rebuild(value: Any, i: int, n: int) -> Any:
    """Row i of every tensor with n rows, in containers of the same type."""
    if isinstance(value, Tensor):
        # Not a view: a row must not keep the whole batch alive.
        return value[i : i + 1].clone() if value.ndim > 1 and value.shape[0] == n else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuild(item, i, n) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_rebuild(item, i, n) for item in value)
    if isinstance(value, Mapping):
        made: Any = type(value)
        return made({key: _rebuild(item, i, n) for key, item in value.items()})
    return value


def _share(value: Any, first: Any) -> Any:
    """`value` with every tensor that equals its counterpart in `first` replaced by that one."""
    if isinstance(value, Tensor):
        return first if isinstance(first, Tensor) and alike(value, first) else value
    if type(value) in (tuple, list) and type(first) is type(value) and len(first) == len(value):
        return type(value)(_share(v, f) for v, f in zip(value, first, strict=True))
    return value  # dicts keep their identity: a block may write into them


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every value."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    same = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return a is b or same or torch.equal(a, b)


class _Alone(Exception):
    """This sample cannot share a batch."""


def _signature(call: Call, index: int) -> Any:
    """Hashable; equal exactly for samples that can be gathered together."""
    hidden = call.hidden
    if (
        hidden.ndim != 3 or hidden.shape[0] != 1
    ):  # an altup stack's or a packed row's dim 0 is no batch
        return ("alone", index)
    try:
        rest = tuple((name, _leaves(name, value)) for name, value in call.rest().items())
    except _Alone:
        return ("alone", index)
    return (len(call.args), tuple(hidden.shape), hidden.dtype, rest)


def _leaves(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if (
            value.ndim > 1 and value.shape[0] != 1
        ):  # alibi [heads, 1, S], mrope [3, 1, S]: batch unknown
            raise _Alone
        # One dimension has no room for a batch: only the very same tensor can be shared.
        return (tuple(value.shape), value.dtype, id(value) if value.ndim < 2 else None)
    if type(value) in (tuple, list):
        return tuple(_leaves(name, item) for item in value)
    if isinstance(value, dict) and name.rpartition(".")[2] in READ_ONLY_DICTS:
        return tuple((key, _leaves(name, item)) for key, item in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Alone


def _merge(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if any(value is not first and not torch.equal(value, first) for value in values):
            return torch.cat(values)
        # Most blocks broadcast one row; some (xglm) insist on as many as the hidden states have.
        return first.expand(len(values), *first.shape[1:]) if first.ndim > 1 else first
    if all(value is first for value in values) and not isinstance(first, tuple | list | dict):
        return first
    if isinstance(first, tuple | list):
        return type(first)(_merge(list(items)) for items in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _merge([value[key] for value in values]) for key in first}
    return first
