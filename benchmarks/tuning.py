# SPDX-License-Identifier: Apache-2.0
"""Tuning against a peer at equal settings: time, peak memory, divergence from the float model.

Both sides get the same checkpoint, the same calibration tokens and the same budget, one after the
other in processes of their own; both results are evaluated by us on the same held-out text.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from autoround.calib import load_tokens
from autoround.evaluate import evaluate
from autoround.pipeline import load_tokenizer

HERE = Path(__file__).parent
PEERS = Path(".cache/peers")
#: Peer -> packages of its environment; torch comes first and alone.
PACKAGES = {"auto-round": ["auto-round==0.16.1", "transformers==5.23.0"]}


@dataclass(frozen=True, slots=True)
class Job:
    """What both sides are asked for."""

    model: Path
    bits: int
    group_size: int
    iters: int
    batch_size: int
    tokens: Path
    work: Path

    def words(self, output: Path) -> list[str]:
        numbers = (self.bits, self.group_size, self.iters, self.batch_size)
        return [str(self.model), str(self.tokens), str(output), *map(str, numbers)]


def main(argv: list[str]) -> None:
    """Compare our tuner with a peer's on the bundled model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tuning", description=main.__doc__)
    parser.add_argument("--peer", choices=list(PACKAGES))
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the peer already")
    parser.add_argument("--model", type=Path, default=HERE / "models" / "pgdoc")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/tuning"))
    o = parser.parse_args(argv)
    o.output.mkdir(parents=True, exist_ok=True)
    tokens = o.output / "tokens.safetensors"
    made = load_tokens(None, load_tokenizer(o.model), nsamples=o.nsamples, seqlen=o.seqlen, seed=42)
    save_file({"ids": made.ids}, tokens)
    job = Job(o.model, o.bits, o.group_size, o.iters, o.batch_size, tokens, o.output)
    rows = [("autoround RTN", _ours(job, iters=0)), ("autoround", _ours(job, iters=o.iters))]
    if o.peer:
        python = o.peer_python or environment(o.peer)
        rows.append((o.peer, _measured(job, str(python), "peers/intel_auto_round.py", o.peer)))
    print(made.description)
    Console(width=110).print(_table(rows))
    (o.output / "result.json").write_text(json.dumps(dict(rows), indent=1) + "\n")


def environment(peer: str) -> Path:
    """The peer's own virtual environment, made on first use."""
    where = PEERS / peer
    python = where / "bin" / "python"
    if not (where / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
        for packages in (["torch==2.13.0"], PACKAGES[peer]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (where / ".ready").touch()
    return python


def _ours(job: Job, iters: int) -> dict[str, Any]:
    return _measured(replace(job, iters=iters), sys.executable, "peers/own.py", f"ours-{iters}")


def _measured(job: Job, python: str, script: str, name: str) -> dict[str, Any]:
    """Run one side; its last line is JSON with seconds, peak bytes and the artefact's directory."""
    output = job.work / name
    subprocess.run(["rm", "-rf", str(output)], check=True)
    command = [python, str(HERE / script), *job.words(output)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found = evaluate(result["directory"], str(job.model))
    assert found.comparison is not None
    return result | {"kl": found.comparison.kl, "perplexity": found.comparison.perplexity}


def _table(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    table = Table("", "seconds", "peak memory", "KL", "perplexity", "time / ours", "KL / ours")
    ours = dict(rows)["autoround"]
    for name, r in rows:
        table.add_row(
            name,
            f"{r['seconds']:.1f}",
            f"{r['peak'] / 1e6:.0f} MB",
            f"{r['kl']:.5f}",
            f"{r['perplexity']:.4f}",
            f"{r['seconds'] / ours['seconds']:.2f}",
            f"{r['kl'] / ours['kl']:.3f}",
        )
    return table
