# SPDX-License-Identifier: Apache-2.0
"""Finding blocks, paused forwards, and the samples they hand over."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.models import Call, PausedForwards, Samples, StreamedModel, find_blocks, split


class Toy(nn.Module):
    """Remote-code style: plain modules, a list of blocks, an input may skip a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))

    def forward(self, x: torch.Tensor, skip: int = -1, fail: int = -1) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            if i == fail:
                raise ZeroDivisionError(f"at {i}")
            x = x if i == skip else layer(x) + 1
        return x


def test_find_blocks(saved: Callable[..., Path]) -> None:
    toy = Toy()
    assert find_blocks(toy).names == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert find_blocks(toy, "norms").modules == tuple(toy.norms)
    for wrong in ("layers.0.0", "nothing", ""):
        with pytest.raises(InputError, match="layers, norms"):
            find_blocks(toy, wrong)
    with pytest.raises(InputError, match="has no list of blocks"):
        find_blocks(nn.Linear(2, 2))
    streamed = StreamedModel(Checkpoint(saved("opt")))
    assert streamed.blocks.name == "model.decoder.layers"


def alive() -> int:
    return sum(t.name.startswith("forward-") for t in threading.enumerate())


def test_samples_may_visit_different_blocks() -> None:
    toy, x = Toy(), torch.randn(3, 8)
    inputs: list[Any] = [{"x": x[:1]}, {"x": x[1:2], "skip": 1}, {"x": x[2:], "skip": 0}]
    visited = []
    with PausedForwards(toy, toy.layers, inputs) as run:
        for index, calls in run:
            visited.append((index, sorted(calls)))
            run.resume({i: run.original(index)(*call.args) for i, call in calls.items()})
    assert visited == [(0, [0, 1]), (1, [0, 2]), (2, [0, 1, 2]), (3, [0, 1, 2])]
    for i, given in enumerate(inputs):
        assert torch.equal(run.results[i], toy(**given))


def test_forwards_run_without_grad_and_blocks_with_the_callers() -> None:
    toy = Toy()
    with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}]) as run:
        for index, calls in run:
            assert torch.is_grad_enabled()
            out = toy.layers[index](calls[0].args[0])  # called by us, a patched block is itself
            assert out.requires_grad
            run.resume({0: out})
    assert not run.results[0].requires_grad


@pytest.mark.parametrize("at", [0, 2])
def test_an_exception_in_a_forward_surfaces(at: int) -> None:
    toy = Toy()
    inputs: list[Any] = [{"x": torch.randn(1, 8)}, {"x": torch.randn(1, 8), "fail": at}]

    def work() -> None:
        with PausedForwards(toy, toy.layers, inputs) as run:
            for _, calls in run:
                run.resume({i: call.args[0] for i, call in calls.items()})

    with pytest.raises(ZeroDivisionError, match=f"at {at}"):
        work()
    assert alive() == 0
    assert all("forward" not in layer.__dict__ for layer in toy.layers)


def test_leaving_early_ends_the_forwards() -> None:
    toy = Toy()
    threads = torch.get_num_threads()
    with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}] * 20) as run:
        for index, calls in run:
            assert alive() == 20
            run.resume({i: call.args[0] for i, call in calls.items()})
            if index == 1:
                break
    assert alive() == 0
    assert run.results == {}
    assert torch.get_num_threads() == threads
    assert all("forward" not in layer.__dict__ for layer in toy.layers)


def test_an_exception_in_the_caller_ends_the_forwards() -> None:
    toy = Toy()

    def work() -> None:
        with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}]) as run:
            for _ in run:
                raise KeyError

    with pytest.raises(KeyError):
        work()
    assert alive() == 0


def test_a_forgotten_output_is_an_error() -> None:
    toy = Toy()

    def work() -> None:
        with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}] * 2) as run:
            for _, calls in run:
                run.resume({0: calls[0].args[0]})

    with pytest.raises(RuntimeError, match="every waiting input"):
        work()


class Tabled(Toy):
    """Gives every block a table, as rotary models do."""

    def forward(self, x: torch.Tensor, by: float = 0.0) -> torch.Tensor:  # type: ignore[override]
        table = torch.arange(8.0)
        for layer in self.layers:
            x = layer(x, table)
            if by:
                table += by
        return x


def test_equal_tables_of_paused_forwards_are_one() -> None:
    toy = Tabled()
    with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}] * 3) as run:
        for _, calls in run:
            assert len({call.args[1].data_ptr() for call in calls.values()}) == 1
            run.resume({i: call.args[0] for i, call in calls.items()})


def test_a_table_changed_in_place_is_refused() -> None:
    toy = Tabled()
    inputs = [{"x": torch.randn(1, 8), "by": 1.0}] * 3

    def work() -> None:
        with PausedForwards(toy, toy.layers, inputs) as run:
            for _, calls in run:
                run.resume({i: call.args[0] for i, call in calls.items()})

    with pytest.raises(RuntimeError, match="in place"):
        work()
    assert alive() == 0


# ---- samples --------------------------------------------------------------------------------


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: Any


def test_samples_store_equal_tensors_once() -> None:
    rope = torch.randn(1, 4, 2)
    calls = {
        i: Call((torch.full((1, 4, 8), float(i)),), {"rope": (rope.clone(), rope + i), "n": None})
        for i in (3, 5, 7)
    }
    samples = Samples(calls)
    assert samples.indices == (3, 5, 7)
    assert samples.call(5).kwargs["rope"][0] is samples.call(3).kwargs["rope"][0]
    merged = samples.gather([3, 5, 7])
    assert merged.hidden.shape == (3, 4, 8)
    shared = merged.kwargs["rope"][0]  # the same for all: three rows, stored once
    assert torch.equal(shared, rope.expand(3, 4, 2))
    assert shared.data_ptr() == samples.call(3).kwargs["rope"][0].data_ptr()
    assert torch.equal(merged.kwargs["rope"][1], torch.cat([rope + i for i in (3, 5, 7)]))
    assert merged.kwargs["n"] is None
    samples.set_hidden(5, torch.zeros(1, 4, 8))
    assert not samples.gather([5, 7]).hidden[0].any()


def test_only_compatible_samples_are_batched() -> None:
    def call(length: int, **kwargs: Any) -> Call:
        return Call((), {"hidden_states": torch.zeros(1, length, 8)} | kwargs)

    alibi = torch.zeros(2, 1, 4)
    samples = Samples(
        {
            0: call(4),
            1: call(6),
            2: call(4),
            3: call(4, mask=torch.ones(1, 4)),
            4: call(4),
            5: call(4, shared_kv_states={}),  # blocks write into it
            6: call(4, shared_kv_states={}),
            7: call(4, alibi=alibi),  # leading dim is no batch
            8: call(4, alibi=alibi),
            9: call(6),
        }
    )
    groups = samples.batches(range(10), 2)
    assert groups == [(0, 2), (1, 9), (3,), (4,), (5,), (6,), (7,), (8,)]
    assert samples.batches(range(10), 2) == groups
    assert (
        samples.call(5).kwargs["shared_kv_states"] is samples.gather([5]).kwargs["shared_kv_states"]
    )
    with pytest.raises(ValueError, match="cannot be batched"):
        samples.gather([0, 1])


@pytest.mark.parametrize(
    "wrap", [tuple, list, lambda x: Pair(*x), lambda x: dict(zip("ab", x, strict=True))]
)
def test_split_keeps_the_container(wrap: Callable[[Any], Any]) -> None:
    hidden = torch.randn(3, 4, 8)
    whole = wrap((hidden, None))
    parts = split(whole, 3)
    assert all(type(part) is type(whole) for part in parts)
    first = [next(iter(p.values())) if isinstance(p, dict) else p[0] for p in parts]
    assert torch.equal(torch.cat(first), hidden)
    assert split(hidden, 1)[0] is hidden
