# SPDX-License-Identifier: Apache-2.0
"""What is kept of a float model, against the whole of it in float64; and the cache for it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoround import floats
from autoround.evaluate import Pair, compare, evaluate
from autoround.floats import Floats

PGDOC = Path(__file__).parents[2] / "benchmarks/models/pgdoc"
Logits = tuple[Tensor, Tensor, Tensor]


def logits(vocabulary: int, spread: float, change: float, positions: int = 400) -> Logits:
    """Log probabilities of a model and of another near it, and following tokens."""
    random = torch.Generator().manual_seed(vocabulary)
    p = torch.randn(positions, vocabulary, generator=random) * spread
    q = p + torch.randn(positions, vocabulary, generator=random) * change
    following = torch.randint(vocabulary, (positions,), generator=random)
    return F.log_softmax(p, -1), F.log_softmax(q, -1), following


def exact(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("change", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("vocabulary", "spread"), [(4096, 1.0), (4096, 4.0), (50_000, 2.0)])
def test_divergence_and_its_stated_error(vocabulary: int, spread: float, change: float) -> None:
    """Tails of .05 to .95 of the mass: the mean is within four of the standard errors stated, and
    those are small; the tail's mass alone would miss nearly all of a heavy tail's share."""
    p, q, following = logits(vocabulary, spread, change)
    kept = Floats.of(p, following)
    want = exact(p, q)
    kl, variance = kept.against(q)
    error = float(variance.sum().sqrt()) / len(kl)
    assert abs(float(kl.mean() - want.mean())) < 4 * error + 1e-9
    assert error < 0.01 * float(want.mean())
    assert float((kl - want).abs().max()) < 0.6 * float(want.max())
    assert torch.equal(kept.target, p.gather(1, following[:, None])[:, 0])
    assert torch.equal(kept.likeliest, p.argmax(-1))


@pytest.mark.parametrize("vocabulary", [7, 100, floats.TOP])
def test_small_vocabularies_are_kept_whole(vocabulary: int) -> None:
    p, q, following = logits(vocabulary, 3.0, 0.3)
    kl, variance = Floats.of(p, following).against(q)
    torch.testing.assert_close(kl, exact(p, q), rtol=1e-5, atol=1e-9)
    assert not variance.any()


@pytest.mark.parametrize("vocabulary", [100, 4096])
def test_a_model_does_not_differ_from_itself(vocabulary: int) -> None:
    p, _, following = logits(vocabulary, 2.0, 0.0)
    kl, variance = Floats.of(p, following).against(p)
    assert not kl.any()
    assert not variance.any()


def test_a_model_that_is_certain() -> None:
    """All the mass on one token, here and there: finite, and exact to rounding."""
    p, q, following = logits(4096, 1.0, 0.0, 8)
    sure = F.log_softmax(torch.full((8, 4096), -60.0).index_fill_(1, torch.tensor([3]), 60.0), -1)
    for one, other in ((sure, sure), (sure, q), (p, sure)):
        kl, _ = Floats.of(one, following).against(other)
        assert kl.isfinite().all()
        torch.testing.assert_close(kl, exact(one, other), rtol=0.05, atol=1e-6)


class Table:
    """A language model that looks its logits up by token."""

    device = torch.device("cpu")

    def __init__(self, seed: int, vocabulary: int = 300) -> None:
        self.table = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(seed))

    def __call__(self, input_ids: Tensor) -> Any:
        return type("Out", (), {"logits": self.table[input_ids]})


def test_comparison_against_plain_arithmetic() -> None:
    """Perplexities, agreement and flips, position by position; seven samples in batches of four."""
    model, other = Table(0), Table(1)
    other.table = model.table + 0.3 * other.table
    ids = torch.randint(50, (7, 9), generator=torch.Generator().manual_seed(5))
    found = compare(other, floats.float_pass(model, ids), ids).summary()
    p, q = (F.log_softmax(m.table[ids[:, :-1]].double(), -1).flatten(0, 1) for m in (model, other))
    following = ids[:, 1:].flatten()
    right, right_q = (x.argmax(-1) == following for x in (p, q))
    assert found.tokens == 56
    nll = [-x.gather(1, following[:, None]).mean() for x in (p, q)]
    assert found.float_perplexity == pytest.approx(float(nll[0].exp()), rel=1e-6)
    assert found.perplexity == pytest.approx(float(nll[1].exp()), rel=1e-6)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.lost == pytest.approx(float((right & ~right_q).double().mean()))
    assert found.won == pytest.approx(float((right_q & ~right).double().mean()))
    assert found.kl == pytest.approx(float(exact(p, q).mean()), abs=5 * found.kl_error)
    assert found.kl_median <= found.kl_p90 <= found.kl_p99


# ---- the cache -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/autoround"


def counted() -> tuple[list[int], Callable[[], dict[str, Tensor]]]:
    calls: list[int] = []

    def make() -> dict[str, Tensor]:
        calls.append(1)
        return {"a": torch.arange(5)}

    return calls, make


def test_made_once(cache: Path) -> None:
    calls, make = counted()
    for _ in range(3):
        assert torch.equal(floats.cached("k" * 64, "floats", make)["a"], torch.arange(5))
    assert len(calls) == 1
    assert [file.suffix for file in cache.iterdir()] == [".tensors"]
    floats.cached("k" * 64, "noise", make)
    floats.cached("l" * 64, "floats", make)
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_none(damage: str, cache: Path) -> None:
    calls, make = counted()
    floats.cached("k" * 64, "floats", make)
    file = next(cache.iterdir())
    whole = file.read_bytes()
    file.write_bytes({"flip": whole[:-1] + b"\x07", "cut": whole[:-3], "empty": b""}[damage])
    assert torch.equal(floats.cached("k" * 64, "floats", make)["a"], torch.arange(5))
    assert len(calls) == 2
    assert file.read_bytes() == whole


def test_no_cache_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the directory would be")
    calls, make = counted()
    for _ in range(2):
        assert torch.equal(floats.cached("k" * 64, "floats", make)["a"], torch.arange(5))
    assert len(calls) == 2


def test_the_oldest_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make = counted()
    floats.cached("a" * 64, "floats", make)
    size = next(cache.iterdir()).stat().st_size
    monkeypatch.setattr(floats, "ROOM", 2 * size)
    for when, key in enumerate("bac"):  # a is used again, so b is the one unused for longest
        floats.cached(key * 64, "floats", make)
        for file in cache.glob(f"floats-{key}*"):
            os.utime(file, (when, when))  # the clock of files is too coarse for this test
    assert {file.name[7] for file in cache.iterdir()} == {"a", "c"}


def test_the_key_is_of_everything(tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((PGDOC / file).read_bytes())
    device = torch.device("cpu")
    keys = {floats.key_of(tmp_path, text, device) for text in ("one", "one", "two")}
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    keys.add(floats.key_of(tmp_path, "one", device))
    (tmp_path / "config.json").write_text((PGDOC / "config.json").read_text() + "\n")
    keys.add(floats.key_of(tmp_path, "one", device))
    assert len(keys) == 4


def test_the_second_artefact_costs_no_float_pass(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"nsamples": 2, "seqlen": 64, "speed": False}
    first = evaluate(str(PGDOC), str(PGDOC), noise=True, **options)
    monkeypatch.setattr(Pair, "reference", property(lambda _: pytest.fail("loaded again")))
    again = evaluate(str(PGDOC), str(PGDOC), noise=True, **options)
    assert again == first
    assert first.comparison is not None
    assert first.comparison.kl == 0
    assert first.noise is not None  # bf16 against f32
    assert 0 < first.noise.comparison.kl < 1e-3
    assert first.noise.comparison.same_top > 0.9
