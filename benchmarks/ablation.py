# SPDX-License-Identifier: Apache-2.0
"""What each part of the closed form is worth: the bundled model, parts added one after another."""

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from autoround.evaluate import evaluate
from autoround.options import build_recipe, device_by_name
from autoround.run import engine, pipeline
from autoround.stages import Feedback, Kept, Measure, Search, Stage, WeightedSearch, feedback

MODEL = Path(__file__).parent / "models" / "pgdoc"
SCHEMES = {"W4G128": {"bits": 4}, "W3G128": {"bits": 3}, "W2G64": {"bits": 2, "group_size": 64}}
SIZE = 8
BARE = Feedback(SIZE, ridges=(), rounds=0)


@dataclass(frozen=True, slots=True)
class Part:
    """A row: stages after min-max search; whether layers are aimed at the block's output."""

    name: str
    stages: Sequence[Stage]
    at_output: bool = False


TARGETED = replace(BARE, ridges=Feedback(SIZE).ridges)
PARTS = [
    Part("min-max ranges (RTN)", []),
    Part("ranges searched, weighted by inputs", [WeightedSearch(SIZE)]),
    Part("error feedback, column by column", [BARE]),
    Part("+ aimed at the layer's float output", [TARGETED]),
    Part("+ aimed at the block's output where a layer adds to it", [TARGETED], True),
    Part("+ 1 round of new scales and descent", [replace(TARGETED, rounds=1)], True),
    Part("+ 5 rounds", [Feedback(SIZE)], True),
    Part("+ kept only where held-out loss falls", [Kept(Feedback(SIZE), "loss_rtn", SIZE)], True),
]


def main(argv: list[str]) -> None:
    """Add the parts of the closed form one after another; KL on held-out text, CPU seconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablation", description=main.__doc__)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["W4G128", "W2G64"])
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/ablation"))
    o = parser.parse_args(argv)
    for scheme in o.schemes:
        title = f"pgdoc {scheme}, {o.nsamples} x {o.seqlen} tokens"
        table = Table("", "KL", "last block's loss", "CPU s", title=title)
        for part in PARTS:
            sizes = {"nsamples": o.nsamples, "seqlen": o.seqlen}
            kl, loss, seconds = _measured(part, SCHEMES[scheme] | sizes, o.output)
            table.add_row(part.name, f"{kl:.5f}", f"{loss:.4g}", f"{seconds:.1f}")
        Console(width=110).print(table)


def _measured(part: Part, changes: dict[str, int], output: Path) -> tuple[float, float, float]:
    shutil.rmtree(output, ignore_errors=True)
    stages = (Search(), Measure("loss_rtn", SIZE), *part.stages)
    # The recipe offers what is worth having; the parts are put in from outside.
    gain = feedback.gain if part.at_output else lambda *_: None
    started = time.process_time()
    with (
        mock.patch.object(engine, "stages_of", return_value=stages),
        mock.patch.object(feedback, "gain", gain),
    ):
        source = pipeline.Source(MODEL, device_by_name(None))
        run = pipeline.quantize(build_recipe("autoround", changes), source, output)
    seconds = time.process_time() - started
    found = evaluate(str(output), str(MODEL))
    assert found.comparison is not None
    return found.comparison.kl, run.blocks[-1].loss, seconds
