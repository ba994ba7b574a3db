# SPDX-License-Identifier: Apache-2.0
"""Further formats of a run, and their proof, beside copying and reading the same files.

A run of the shape of Qwen3-0.6B (0.6 G weights) is made once; then, format by format, `autoround
export` against `cp -r` of what it wrote and `autoround verify` against reading the files (`cat`),
each a process of its own, imports subtracted. Peak memory is the exporting process's.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.decode import random_model

CODE = """
import json, sys, time
from pathlib import Path
from autoround.export import write
from autoround.formats import formats_by_names
from autoround.run.record import peak_bytes
from autoround.verify import verify
before, start = peak_bytes(), time.perf_counter()
what, run, name, out = sys.argv[1:]
if what == "export":
    write(run, formats_by_names(name), out, 5 * 10**9)
else:
    assert verify(out, run).ok
print(json.dumps([time.perf_counter() - start, before, peak_bytes()]))
"""
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx", "fake")


def main(argv: list[str]) -> None:
    """Export and verify, several times each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks export", description=__doc__)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/decode"))
    o = parser.parse_args(argv)
    run, out, copy = o.output / "run", o.output / "exported", o.output / "copy"
    if not (run / "config.json").exists():
        model = random_model(o.output / "qwen3-0.6b")
        own = [
            str(Path(sys.executable).parent / "autoround"),
            "quantize",
            str(model),
            "--recipe",
            "rtn",
        ]
        subprocess.run([*own, "-q", "-o", str(run)], check=True)
    table = Table(
        "format", "GB", "export s", "x cp", "verify s", "x reading", "peak MB, of it imports"
    )
    rows: dict[str, dict[str, list[float]]] = {}
    for name in o.formats:
        times: dict[str, list[float]] = {"export": [], "cp": [], "verify": [], "read": []}
        for _ in range(o.turns):
            for path in (out, copy):
                shutil.rmtree(path, ignore_errors=True)
            seconds, before, peak = _told("export", run, name, out)
            times["export"].append(seconds)
            times["cp"].append(_timed(["cp", "-r", str(out), str(copy)]))
            times["verify"].append(_told("verify", run, name, out)[0])
            files = [str(f) for f in out.glob("*.safetensors")]
            times["read"].append(_timed(["cat", *files]))
        size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        rows[name] = times
        mid = {key: statistics.median(own) for key, own in times.items()}
        table.add_row(
            name, f"{size / 1e9:.2f}", f"{mid['export']:.2f}", f"{mid['export'] / mid['cp']:.2f}",
            f"{mid['verify']:.2f}", f"{mid['verify'] / mid['read']:.1f}",
            f"{peak / 1e6:.0f}, {before / 1e6:.0f}",
        )  # fmt: skip
    for path in (out, copy):
        shutil.rmtree(path, ignore_errors=True)
    Console().print(table)
    if o.json:
        o.json.write_text(json.dumps(rows, indent=1) + "\n")


def _told(what: str, run: Path, name: str, out: Path) -> tuple[float, float, float]:
    words = [sys.executable, "-c", CODE, what, str(run), name, str(out)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, before, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, before, peak


def _timed(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
