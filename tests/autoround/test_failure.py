# SPDX-License-Identifier: Apache-2.0
"""A run that fails by no fault of its user leaves one line and a directory that repeats it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoround import cli
from autoround.run.failure import advice, describe
from autoround.run.reproduce import reproduce
from autoround.stages import Feedback, SignRound

Saved = Callable[..., Path]


def fail(
    stage: type, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> Path:
    """A run whose second block breaks in a stage; the directory it leaves."""
    run = stage.run

    def broken(self: object, task: object) -> None:
        if task.index == 1:  # type: ignore[attr-defined]
            raise ArithmeticError("this block\nis broken")
        run(self, task)

    monkeypatch.setattr(stage, "run", broken)
    text = tmp_path / "text.jsonl"
    ids = torch.randint(0, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row.tolist()} for row in ids]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(SystemExit) as end:
        cli.run(
            ["quantize", str(saved("llama")), "-o", str(tmp_path / "out"), "--group-size", "32",
             "--dataset", str(text), "--nsamples", "8", "--seqlen", "16", *options]
        )  # fmt: skip
    assert end.value.code == 1
    monkeypatch.setattr(stage, "run", run)
    return tmp_path / "out-failure"


@pytest.mark.parametrize(("stage", "options"), [(Feedback, ()), (SignRound, ("--iters", "2"))])
def test_one_line_and_a_block_that_runs_again(
    stage: type, options: tuple[str, ...], saved: Saved, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = fail(stage, saved, tmp_path, monkeypatch, *options)
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "error: ArithmeticError: this block is broken; 1 of 3 blocks are kept"
    )
    assert f"; details in {bundle}" in said[0]
    assert "; next: " in said[0]
    facts = json.loads((bundle / "failure.json").read_text())
    assert facts["block"]["name"] == "model.layers.1"
    assert facts["block"]["tensors"]["weight mlp.up_proj.weight"]["not_finite"] == 0
    assert facts["recipe"]["nsamples"] == 8
    assert facts["log"][-1]["event"] == "block_failed"
    assert "broken" in "".join(facts["traceback"])
    found = reproduce(bundle)
    assert "loss_rtn" in found


def test_the_script_stands_alone(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fail(SignRound, saved, tmp_path, monkeypatch, "--iters", "2")
    done = subprocess.run([sys.executable, bundle / "reproduce.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout
    assert "no failure" in done.stdout


def test_other_commands_show_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(what: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("autoround.cli.lists._listing", broken)
    with pytest.raises(SystemExit) as end:
        cli.run(["list", "schemes"])
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    where = Path(line.split("details in ")[1].split(";")[0])
    assert json.loads((where / "failure.json").read_text())["command"] == [
        "autoround", "list", "schemes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError(), "autoround plan"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "autoround plan"),
        (OSError(28, "No space left on device"), "another -o"),
        (KeyError("x"), "report"),
    ],
)
def test_advice_is_one_step(error: Exception, word: str) -> None:
    assert word in advice(error)


def test_statistics_show_what_is_broken() -> None:
    found = describe(torch.tensor([[1.0, float("nan")], [-3.0, float("inf")]]))
    assert (found["not_finite"], found["min"], found["max"]) == (2, -3.0, 1.0)
