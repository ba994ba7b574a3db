# SPDX-License-Identifier: Apache-2.0
"""Runs that grow until the time is spent or the KL reached, and can be repeated without a clock."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.run import budget, pipeline

CPU = torch.device("cpu")
ROWS = [[3 + (i * 7 + j) % 100 for j in range(16)] for i in range(200)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Source:
    return pipeline.Source(zoo.save("llama", tmp_path_factory.mktemp("llama")), CPU)


def recipe(**changes: Any) -> Any:
    return build_recipe(None, {"seqlen": 16, "group_size": 32, "bits": 3} | changes)


def clock(monkeypatch: pytest.MonkeyPatch, a_sample: float) -> None:
    """Time passes with the samples of each run, and not else."""
    now, original = [0.0], pipeline.quantize

    def counted(given: Any, *words: Any, **named: Any) -> Any:
        run = original(given, *words, **named)
        now[0] += a_sample * given.nsamples
        return run

    monkeypatch.setattr(budget.pipeline, "quantize", counted)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])


def made(source: pipeline.Source, output: Path, goal: budget.Goal, **changes: Any) -> list[int]:
    _, rungs = budget.quantize(recipe(**changes), source, output, goal, dataset=ROWS)
    return [rung.nsamples for rung in rungs]


@pytest.mark.parametrize(
    ("seconds", "samples"),
    [
        (1, [32]),  # the least run is made in any case
        (60, [32]),
        (80, [32, 48]),
        (160, [32, 128]),
        (400, [32, 128]),  # the text has 200 samples, 512 would be next but for the time
    ],
)
def test_samples_that_time_buys(
    seconds: int, samples: list[int], source: pipeline.Source, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock(monkeypatch, 1.0)
    assert made(source, tmp_path / "o", budget.Goal(seconds=seconds)) == samples
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_plain_run_gives_the_same_bytes(source: pipeline.Source, tmp_path: Path) -> None:
    run, rungs = budget.quantize(
        recipe(), source, tmp_path / "o", budget.Goal(seconds=1e-9), dataset=ROWS
    )
    assert run.output == tmp_path / "o"
    record = json.loads(next(run.output.rglob("autoround.json")).read_text())
    assert record["recipe"]["nsamples"] == rungs[-1].nsamples == 32
    again = recipe(nsamples=record["recipe"]["nsamples"])
    pipeline.quantize(again, source, tmp_path / "again", dataset=ROWS)
    files = sorted(p.relative_to(run.output) for p in run.output.rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (run.output / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("kls", "target", "samples", "kept"),
    [
        ([0.3, 0.2], 0.25, [32, 128], 128),
        ([0.2], 0.25, [32], 32),
        ([0.2, 0.3], 0.1, [32, 128], 32),  # never reached: the least stays
    ],
)
def test_samples_until_the_kl(
    kls: list[float], target: float, samples: list[int], kept: int, source: pipeline.Source,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = iter(kls)
    monkeypatch.setattr(budget, "_kl", lambda *_: next(found))
    assert made(source, tmp_path / "o", budget.Goal(kl=target)) == samples
    record = json.loads(next((tmp_path / "o").rglob("autoround.json")).read_text())
    assert record["recipe"]["nsamples"] == kept


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_forms_of_a_budget(text: str, seconds: float) -> None:
    assert budget.goal(text, None) == budget.Goal(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "kl", "message"),
    [
        ("30", None, "write it like 90s, 30m or 2h"),
        ("0m", None, "write it like"),
        (None, 0.0, "target_kl=0.0: give a number above 0"),
    ],
)
def test_bad_goals(text: str | None, kl: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        budget.goal(text, kl)


def test_rounding_to_nearest_has_nothing_to_spend_on(
    source: pipeline.Source, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="samples of the closed form"):
        budget.quantize(build_recipe("rtn", {}), source, tmp_path / "o", budget.Goal(seconds=60))
    assert not (tmp_path / "o").exists()
