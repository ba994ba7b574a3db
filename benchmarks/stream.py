# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest without a model: whole processes, ours, auto-round's and `cp`, in turns.

A checkpoint of the shape of Qwen3-0.6B (1.5 GB, bf16). `ours, no imports` is the run inside our
process; each process runs on one thread and its output is removed before the next.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks._peer import PEERS
from benchmarks.decode import random_model

OWN = """
import json, sys, time
from pathlib import Path
from autoround.run import stream
from autoround.checkpoint import Checkpoint
from autoround.options import build_recipe
from autoround.run.events import unheard
from autoround.run.record import peak_bytes
start = time.perf_counter()
stream.quantize(build_recipe("rtn", {}), Checkpoint(sys.argv[1]), Path(sys.argv[2]), unheard)
print(json.dumps([time.perf_counter() - start, peak_bytes()]))
"""


def main(argv: list[str]) -> None:
    """Quantize to W4A16 in groups of 128, several times each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks stream", description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", type=Path, help="Another checkpoint's directory.")
    parser.add_argument("--peer-bin", type=Path, default=PEERS / "auto-round" / "bin")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/decode"))
    o = parser.parse_args(argv)
    source = o.model or random_model(o.output / "qwen3-0.6b")
    model, out = str(source.resolve()), o.output / "stream"
    own = [str(Path(sys.executable).parent / "autoround"), "quantize", model, "--recipe", "rtn"]
    theirs = [str(o.peer_bin / "auto-round"), "--model", model, "--model_free", "--iters", "0"]
    commands = {
        "ours": [*own, "-q", "-o", str(out)],
        "ours, no imports": [sys.executable, "-c", OWN, model, str(out)],
        "cp": ["cp", "-rL", model, str(out)],
        "auto-round": [*theirs, "--scheme", "W4A16", "--output_dir", str(out)],
    }
    if not o.peer_bin.exists():
        print(f"auto-round not installed: make {PEERS}/auto-round/.ready")
        del commands["auto-round"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(o.turns):
        for name, command in commands.items():
            times[name].append(_seconds(command, out, told=name == "ours, no imports"))
    medians = {name: statistics.median(own) for name, own in times.items()}
    table = Table("", "seconds", "of ours")
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / medians['ours']:.2f}")
    Console().print(table)
    print(f"ours without imports: {medians['ours, no imports'] / medians['cp']:.2f} x cp")
    if o.json:
        o.json.write_text(json.dumps(times, indent=1) + "\n")


def _seconds(command: list[str], out: Path, told: bool) -> float:
    """Of the whole process, or as it told in its last line."""
    shutil.rmtree(out, ignore_errors=True)
    one = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=one)
    seconds = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    return float(json.loads(done.stdout.splitlines()[-1])[0]) if told else seconds
