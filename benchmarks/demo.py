# SPDX-License-Identifier: Apache-2.0
"""The whole road on the bundled model: the real commands, then one table of what they made."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "models" / "pgdoc"
TOKENS = ["--seqlen", "512"]
#: (row label, arguments of `autoround quantize`)
RUNS = [
    ("W4 g128 RTN", ["--scheme", "W4A16", "--recipe", "rtn"]),
    ("W4 g128 tuned", ["--scheme", "W4A16", *TOKENS]),
    ("W3 g128 RTN", ["--scheme", "W3A16", "--recipe", "rtn"]),
    ("W3 g128 tuned", ["--scheme", "W3A16", *TOKENS]),
    ("W2 g64 RTN", ["--scheme", "W2A16G64", "--recipe", "rtn"]),
    ("W2 g64 tuned", ["--scheme", "W2A16G64", *TOKENS]),
]


def main(argv: list[str]) -> None:
    """Quantize and evaluate every row of RUNS; ``--quick`` calibrates on 32 samples."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=main.__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"))
    options = parser.parse_args(argv)
    shutil.rmtree(options.output, ignore_errors=True)
    rows = []
    for label, arguments in RUNS:
        out = options.output / label.replace(" ", "-").lower()
        tuned = "--recipe" not in arguments
        quick = ["--nsamples", "32"] if options.quick and tuned else []
        _autoround("quantize", str(MODEL), "-o", str(out), *arguments, *quick)
        text = _autoround("eval", str(out), "--against", str(MODEL), "--json", capture=True)
        rows.append((label, json.loads(text)))
    console = Console(width=110)
    console.print(_table(rows))
    tuned_dir = options.output / "w4-g128-tuned"
    console.print(f"Load it: transformers.AutoModelForCausalLM.from_pretrained('{tuned_dir}')")


def _autoround(*arguments: str, capture: bool = False) -> str:
    """The installed command, as a user would type it; its failure is ours."""
    print("$ autoround " + " ".join(arguments), flush=True)
    command = [str(Path(sys.executable).parent / "autoround"), *arguments]
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


def _table(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    columns = ("model", "size", "bits", "perplexity", "KL", "same top", "tokens/s", "vs float")
    table = Table(*columns, title="pgdoc, held-out text; tokens/s: batch 1, on hal.qgemm")
    _, first = rows[0]
    c = first["comparison"]
    speed = f"{median(result['float_speed'] for _, result in rows):.0f}"
    size = f"{first['float_nbytes'] / 1e6:.1f} MB"
    table.add_row("float (bf16)", size, "16", f"{c['float_perplexity']:.3f}", "", "", speed, "")
    for label, result in rows:
        c = result["comparison"]
        table.add_row(
            label,
            f"{result['nbytes'] / 1e6:.1f} MB",
            f"{result['bits_per_weight']:.2f}",
            f"{c['perplexity']:.3f}",
            f"{c['kl']:.5f}",
            f"{c['same_top']:.1%}",
            f"{result['speed']:.0f}",
            f"{result['speed'] / result['float_speed']:.2f}x",
        )
    return table
