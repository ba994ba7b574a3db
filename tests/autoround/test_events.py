# SPDX-License-Identifier: Apache-2.0
"""What a run tells: its events, the log on disk, JSON lines, what a terminal shows."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from autoround import cli
from autoround.cli.terminal import Pace, Terminal
from autoround.options import build_recipe
from autoround.run import log, pipeline
from autoround.run.events import Event, to_json, together
from autoround.verify import verify

Saved = Callable[..., Path]
SMALL = {"nsamples": 4, "seqlen": 16, "batch_size": 2, "group_size": 32}


def told(source: Path, output: Path, listener: Any = None, **changes: Any) -> list[Event]:
    """Every event of a small run."""
    heard: list[Event] = []
    rows = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    recipe = build_recipe(None, SMALL | changes)
    where = pipeline.Source(source, torch.device("cpu"))
    both = together(heard.append, *([listener] if listener else []))
    pipeline.quantize(recipe, where, output, dataset=rows, listener=both)
    return heard


def names(events: list[Event]) -> list[str]:
    return [to_json(event)["event"] for event in events]


def test_order_and_content(saved: Saved, tmp_path: Path) -> None:
    heard = told(saved("llama"), tmp_path / "out", iters=2)
    block = ["block_started", "step", "step", "block_done"]
    assert names(heard) == ["planned", "calibrated", *block * 3, "finished"]
    lines = [json.loads(json.dumps(to_json(event))) for event in heard]
    record = json.loads((tmp_path / "out/autoround.json").read_text())
    done = [line for line in lines if line["event"] == "block_done"]
    assert [{k: line[k] for k in ("name", "loss_rtn", "loss")} for line in done] == record["blocks"]
    assert lines[1]["tokens"] == [4, 16] == record["calibration"]["shape"]
    assert lines[1]["digest"] == record["calibration"]["digest"]
    assert lines[-1]["peak_bytes"] >= max(line["peak_bytes"] for line in done) > 0


def test_a_run_without_losses_is_json(saved: Saved, tmp_path: Path) -> None:
    recipe = build_recipe("rtn", {"group_size": 32})
    source, heard = pipeline.Source(saved("llama"), torch.device("cpu")), list[Event]()
    pipeline.quantize(recipe, source, tmp_path / "out", listener=heard.append)
    assert names(heard) == ["planned", *["block_done"] * 3, "finished"]
    assert to_json(heard[1])["loss"] is None
    assert "NaN" not in json.dumps([to_json(event) for event in heard])


def test_the_log_is_written_as_the_run_goes(saved: Saved, tmp_path: Path) -> None:
    output, seen = tmp_path / "out", list[int]()
    own = log.Log(output)

    def watch(event: Event) -> None:
        path = output / log.NAME
        seen.append(len(path.read_text().splitlines()) if path.exists() else 0)

    told(saved("llama"), output, together(own, watch), iters=2)
    assert seen == [0, 0, *range(3, 16)]  # planned and calibrated wait for the directory
    lines = [json.loads(line) for line in (output / log.NAME).read_text().splitlines()]
    assert [line["event"] for line in lines] == [json.loads(text)["event"] for text in own.tail]
    assert all(line["time"].endswith("Z") for line in lines)
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert verify(str(output), None).ok


def test_a_log_that_cannot_be_written_stops_nothing(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = log.Log(tmp_path / "file")
    told(saved("llama"), tmp_path / "out", own, iters=2)
    assert len(own.tail) == 15


def here(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.run(list(arguments))
    return int(end.value.code or 0)


def test_json_on_stdout_and_words_on_stderr(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(saved("llama")), "-o", str(tmp_path / "o"), "--group-size", "32", "--json")
    assert here("quantize", *arguments, "--recipe", "rtn") == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["event"] for line in lines] == [
        "planned",
        "forecast",
        *["block_done"] * 3,
        "finished",
    ]
    assert "VERIFIED" in captured.err
    assert here("quantize", str(tmp_path / "no"), "-o", str(tmp_path / "p"), "--json") == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "failed"
    assert "does not exist" in last["error"]


# ---- the terminal ------------------------------------------------------------------------------


def shown(width: int | None, events: list[Event], output: Path) -> str:
    """What a console of that width holds in the end; None = a file."""
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=width is not None, no_color=True,
                      color_system=None, legacy_windows=False)  # fmt: skip
    terminal = Terminal(console, 2, output)
    for event in events:
        terminal(event)
    return stream.getvalue()


@pytest.fixture(scope="module")
def events(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return told(saved("llama"), tmp_path_factory.mktemp("run") / "out", iters=2)


@pytest.mark.parametrize("width", [None, 40, 60, 80, 140])
def test_every_block_is_a_row_that_stays(
    width: int | None, events: list[Event], tmp_path: Path
) -> None:
    text = shown(width, events, tmp_path)
    rows = [line for line in text.splitlines() if line.strip().startswith(("1/3", "2/3", "3/3"))]
    assert len(rows) == 3
    assert all(len(row) <= (width or 200) for row in rows)
    assert all("%" in row for row in rows)
    full = width is None or width >= 80
    assert all(("layers." in row) == (full or width == 60) for row in rows)
    assert ("peak" in text) == (width is None or width == 140)
    assert "\x1b" not in text or width is not None


def test_time_left_follows_the_weights_of_blocks_done_before() -> None:
    now = [100.0]
    pace = Pace([10, 10, 20, 40], clock=lambda: now[0])
    assert pace.left() == 0
    pace.done(0, 5.0)  # before the run was resumed
    pace.start()
    assert pace.left() == pytest.approx(5 / 10 * 70)
    now[0] += 4
    assert pace.left() == pytest.approx(35 - 4)
    pace.done(1, 7.0)
    assert pace.left() == pytest.approx(12 / 20 * 60)
    pace.done(2, 12.0)
    pace.done(3, 20.0)
    assert (pace.left(), pace.finished) == (0, 4)
