# SPDX-License-Identifier: Apache-2.0
"""Paused forwards: the unmodified model runs once per input and stands still at every block.

Each input's forward lives in its own thread, but only one thread runs at any moment (a thread is a
coroutine here): the order of work, and so the result, is the same every time."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from autoround.models.samples import Call, alike

STACK = 1 << 23  # bytes; virtual until touched. Remote code can be deep, the default may be small


class _Stop(BaseException):
    """Ends a parked forward; BaseException so that model code cannot swallow it."""


@dataclass(slots=True, eq=False)
class _Forward:
    """One input's forward. `go` wakes it, `parked` says that it stands again (or ended)."""

    inputs: Mapping[str, Any]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    parked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    block: int | None = None  # where it waits
    call: Call | None = None
    reply: Any = None
    stop: bool = False
    steps: int = 0
    result: Any = None
    error: BaseException | None = None

    def wait(self, block: int, call: Call) -> Any:
        """In the forward's own thread: hand over a call, sleep until its output is there."""
        self.block, self.call = block, call
        self.parked.release()
        self.go.acquire()
        if self.stop:
            raise _Stop
        reply, self.reply = self.reply, None
        return reply

    def step(self) -> None:
        """In the driving thread: run it to its next block or end; re-raise what it raised."""
        self.block = self.call = None
        self.steps += 1
        self.go.release()
        self.parked.acquire()
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class PausedForwards:
    """Drives `model` over several inputs, block by block.

        with PausedForwards(model, blocks, inputs) as run:
            for index, calls in run:                       # lowest waiting block first
                outputs = {i: run.original(index)(*c.args, **c.kwargs) for i, c in calls.items()}
                run.resume(outputs)
        run.results[0]                                     # what the model returned for inputs[0]

    An exception in a forward is raised here. Leaving early ends every forward. Forwards run under
    no_grad and without a cache; blocks called by the caller run under the caller's own modes."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        inputs: Sequence[Mapping[str, Tensor]],
        arrived: Callable[[int, Call], None] = lambda i, call: None,
    ) -> None:
        """``arrived``: told of each input at its first block, before the next one starts."""
        self.model, self._arrived = model, arrived
        self.results: dict[int, Any] = {}
        self._blocks = tuple(blocks)
        self._originals: tuple[Callable[..., Any], ...] = ()
        self._shadowed: list[Any] = []
        self._own = threading.local()
        self._shared: list[tuple[Tensor, int]] = []
        self._forwards = [_Forward(given) for given in inputs]
        takes = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    def __enter__(self) -> Self:
        self._originals = tuple(block.forward for block in self._blocks)
        self._shadowed = [block.__dict__.get("forward") for block in self._blocks]
        for index, block in enumerate(self._blocks):
            # An instance attribute shadows the method. Replacing the module would break ties and
            # the model's own reads of block attributes.
            block.__dict__["forward"] = self._gate(index)
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def __iter__(self) -> Iterator[tuple[int, dict[int, Call]]]:
        while waiting := {f.block for f in self._forwards if f.block is not None}:
            index = min(waiting)
            calls = {
                i: f.call
                for i, f in enumerate(self._forwards)
                if f.block == index and f.call is not None
            }
            steps = {i: self._forwards[i].steps for i in calls}
            self._share(calls)
            yield index, calls
            if any(self._forwards[i].steps == count for i, count in steps.items()):
                raise RuntimeError(
                    f"block {index}: resume() must give every waiting input its output"
                )

    def at(self, index: int, inputs: Iterable[int]) -> dict[int, Call] | None:
        """The calls of inputs that have been resumed and all wait at one block now, else None."""
        waiting = self.waiting
        if any(i not in waiting or waiting[i][0] != index for i in inputs):
            return None
        calls = {i: waiting[i][1] for i in inputs}
        self._share(calls)
        return calls

    @property
    def waiting(self) -> dict[int, tuple[int, Call]]:
        """Inputs that stand at a block: its index, and how the model calls it."""
        return {
            i: (f.block, f.call)
            for i, f in enumerate(self._forwards)
            if f.block is not None and f.call is not None
        }

    @property
    def replies(self) -> dict[int, int]:
        """How many outputs each input has been given."""
        return {i: f.steps - 1 for i, f in enumerate(self._forwards)}

    def resume(self, outputs: Mapping[int, Any]) -> None:
        """Give inputs their block's output (its own container) and run each to its next stop."""
        for i in sorted(outputs):
            forward = self._forwards[i]
            if forward.block is None:
                raise RuntimeError(f"input {i} does not wait for an output")
            forward.reply = outputs[i]
            self._step(i)

    def _share(self, calls: Mapping[int, Call]) -> None:
        """What all inputs of a block are given alike lies in one memory."""
        self._unchanged()
        first = calls[min(calls)].rest()
        self._shared = [s for call in calls.values() for s in _one_copy(call.rest(), first)]

    def _unchanged(self) -> None:
        """Tensors of one memory for all inputs must not have been written to."""
        if any(tensor._version != version for tensor, version in self._shared):
            raise RuntimeError(
                f"{type(self.model).__name__} changes what it gives to blocks in place; "
                "this architecture is not supported yet: use --recipe rtn, and report it"
            )

    def original(self, index: int) -> Callable[..., Any]:
        """The unpatched forward of block `index`."""
        return self._originals[index]

    def _gate(self, index: int) -> Callable[..., Any]:
        original = self._originals[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            mine: _Forward | None = getattr(self._own, "forward", None)
            # Not one of our threads: the caller runs the block itself, through block(...).
            return (
                original(*args, **kwargs) if mine is None else mine.wait(index, Call(args, kwargs))
            )

        return forward

    def _start(self) -> None:
        threads = torch.get_num_threads()
        stack = threading.stack_size(STACK)
        try:
            for i, forward in enumerate(self._forwards):
                forward.thread = threading.Thread(
                    target=self._run, args=(forward,), name=f"forward-{i}", daemon=True
                )
                forward.thread.start()
                try:
                    self._step(i)
                finally:
                    torch.set_num_threads(threads)  # undo _run's for this and later threads
                first = self._forwards[0].call
                if forward.call is not None:
                    self._arrived(i, forward.call)
                    if first is not None:
                        _one_copy(forward.call.rest(), first.rest())
        finally:
            threading.stack_size(stack)

    def _step(self, i: int) -> None:
        forward = self._forwards[i]
        forward.step()
        if forward.block is None:
            self.results[i] = forward.result
            forward.result = None

    def _run(self, forward: _Forward) -> None:
        forward.go.acquire()
        self._own.forward = forward
        # OpenMP gives every thread that computes in parallel its own pool of workers, alive as long
        # as the thread: 128 parked forwards on 64 cores would hold 8000. The setting is per thread.
        torch.set_num_threads(1)
        try:
            if not forward.stop:
                with torch.no_grad():  # grad mode is thread-local
                    forward.result = self.model(**forward.inputs, **self._options)
        except _Stop:
            pass
        except BaseException as error:
            forward.error = error
        finally:
            forward.block = forward.call = None
            forward.parked.release()

    def _end(self) -> None:
        for forward in self._forwards:
            if forward.thread is not None and forward.thread.is_alive():
                forward.stop = True
                forward.go.release()
                forward.thread.join()
            forward.call = forward.reply = None
        for block, shadowed in zip(self._blocks, self._shadowed, strict=True):
            block.__dict__.pop("forward", None)
            if shadowed is not None:
                block.__dict__["forward"] = shadowed


def _one_copy(given: Mapping[str, Any], first: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
    """Let tensors that equal those of the first input (rotary tables, masks) share its memory.

    Every paused forward holds its own: 8 MB an input for a mask of 2048 tokens. Returns those that
    are shared now, with their version: one changed in place would change for all.
    """
    shared: list[tuple[Tensor, int]] = []
    for name, value in given.items():
        for mine, other in zip(_leaves(value), _leaves(first.get(name)), strict=False):
            if alike(mine, other):
                if mine.data_ptr() != other.data_ptr():
                    mine.set_(other)  # type: ignore[call-overload]
                shared.append((mine, mine._version))
    return shared


def _leaves(value: Any) -> list[Tensor]:
    """Tensors in nested tuples and lists; a dict may be state that blocks write into."""
    if isinstance(value, Tensor):
        return [value]
    items = value if type(value) in (tuple, list) else ()
    return [leaf for item in items for leaf in _leaves(item)]
