# SPDX-License-Identifier: Apache-2.0
"""Our directories in Intel's loader, and its directories in ours: the same logits, in figures.

    python tests/interop/run_auto_round.py [--peer-python VENV/bin/python] [--filter WORD]

The peer's environment holds `auto-round`, torch and transformers; ours does not know that package.
Every peer step is a process of its own, because its loader changes transformers for all that
follows in the same process. Prints one row a case and exits with 1 if one is over its bound.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import autoround
from autoround.checkpoint import resolve
from autoround.formats import FORMATS, Quantized
from autoround.options import build_recipe
from autoround.run import pipeline
from hal import QExperts, QLinear

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "autoround"), str(HERE.parents[1])]
from benchmarks import _peer  # noqa: E402

PGDOC = HERE.parents[1] / "benchmarks/models/pgdoc"

#: Largest |difference of logits| over largest |logit|. Our kernels keep ``scale * (code - zero)``
#: exact; the peer's torch kernels round it to fp16 (2**-11 of each weight, and of activations
#: where they compute in fp16), which the blocks carry on: a few thousandths at most. A wrong code,
#: zero point or scale moves the logits by tenths.
BOUND = 5e-3


@dataclass(frozen=True)
class Case:
    """``of``: pgdoc or a zoo name. ``options``: a Recipe's fields, or the peer's arguments.
    ``peer_cannot``: why its loader is known to fail, whoever wrote the directory."""

    name: str
    of: str
    direction: str
    options: dict[str, Any] = field(default_factory=dict)
    peer_cannot: str = ""


@dataclass(frozen=True)
class Outcome:
    """``difference``: largest relative difference of the logits of 99 % of the tokens, ``largest``
    of all; ``effect``: of ours against the float model. ``repacked``: a directory of theirs, read
    and packed again by us, gives its own bytes."""

    case: Case
    packing: str = ""
    ours: int = 0
    theirs: int = 0
    difference: float = math.nan
    largest: float = math.nan
    effect: float = math.nan
    repacked: bool = True
    error: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``FAIL``, or ``peer`` where only the peer's loader fails, as known."""
        # Codes in a wrong order are noise, further from the float model than 2 bits are.
        if not self.ours or not self.repacked or not self.effect < 0.6:
            return "FAIL"
        if self.case.peer_cannot and not self.difference <= BOUND:
            return "peer"
        # In a mixture of experts rounding sends a rare token to another expert.
        near = self.difference <= BOUND and self.difference < self.effect / 2
        return "ok" if near and not self.error else "FAIL"


NO_AWQ = "no AWQ kernel on CPU without gptqmodel: a TypeError, for its own directories too"
MIXED = {
    "model.layers.0": {"bits": 8},
    "model.layers.1.self_attn": {"bits": 2, "group_size": 32},
    "down_proj": {"bits": 3},
}
OURS = [
    Case("w4 g128 sym", "pgdoc", "ours"),
    Case("w4 g32 sym", "pgdoc", "ours", {"group_size": 32}),
    Case("w4 row sym", "pgdoc", "ours", {"group_size": -1}),
    Case("w4 g128 asym", "pgdoc", "ours", {"sym": False}, NO_AWQ),
    Case("w4 g128 asym raw", "pgdoc", "ours", {"sym": False, "format": "auto_round:gptqmodel"}),
    Case("w2 g32 sym", "pgdoc", "ours", {"bits": 2, "group_size": 32}),
    Case("w3 g128 sym", "pgdoc", "ours", {"bits": 3}),
    Case("w8 g128 sym", "pgdoc", "ours", {"bits": 8}),
    Case("w2 g32 asym", "pgdoc", "ours", {"bits": 2, "group_size": 32, "sym": False}),
    Case("w8 g128 asym", "pgdoc", "ours", {"bits": 8, "sym": False}),
    Case("mixed 2 3 4 8", "pgdoc", "ours", {"layer_config": MIXED}),
    Case("w4 tuned", "pgdoc", "ours", {"iters": 8, "nsamples": 8, "seqlen": 64, "batch_size": 4}),
    Case("moe w4 g32 sym", "qwen3_moe", "ours", {"group_size": 32}),
    Case("moe w3 g32 asym", "qwen3_moe", "ours", {"bits": 3, "group_size": 32, "sym": False}),
    Case(
        "mixtral w4 g32",
        "mixtral",
        "ours",
        {"group_size": 32},
        "expert names w1, w2, w3 are not renamed: NaN",
    ),
    Case("gpt2 w4 g32", "gpt2", "ours", {"group_size": 32}),
    Case("llama w4 g32", "llama", "ours", {"group_size": 32}),
]
THEIRS = [
    Case("rtn w4 g128 sym", "pgdoc", "theirs", {"bits": 4, "iters": 0}),
    Case("rtn w4 g128 asym", "pgdoc", "theirs", {"bits": 4, "iters": 0, "sym": False}, NO_AWQ),
    Case("plain rtn w4 g128", "pgdoc", "theirs", {"bits": 4, "iters": 0, "disable_opt_rtn": True}),
    Case("rtn w2 g32 sym", "pgdoc", "theirs", {"bits": 2, "iters": 0, "group_size": 32}),
    Case("rtn w3 g128 sym", "pgdoc", "theirs", {"bits": 3, "iters": 0}),
    Case("rtn w8 g128 sym", "pgdoc", "theirs", {"bits": 8, "iters": 0}),
    Case("rtn w3 g64 asym", "pgdoc", "theirs", {"bits": 3, "iters": 0, "sym": False,
                                               "group_size": 64}),
    Case("tuned w4 g128 sym", "pgdoc", "theirs", {"bits": 4, "iters": 8}),
    Case("tuned w4 g128 asym", "pgdoc", "theirs", {"bits": 4, "iters": 8, "sym": False}, NO_AWQ),
    Case("tuned mixed", "pgdoc", "theirs", {"bits": 4, "iters": 8, "layer_config": {
        "k_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 32}}}),
]  # fmt: skip
CASES = OURS + THEIRS


@dataclass(frozen=True)
class Bench:
    """The two environments and a place for files."""

    peer: str
    work: Path

    def source(self, of: str) -> Path:
        """The float model; zoo models are made on first use."""
        if of == "pgdoc":
            return PGDOC
        import zoo

        path = self.work / f"zoo-{of}"
        return path if path.exists() else zoo.save(of, path)

    def ids(self, of: str) -> Path:
        """Token rows for this model, the same for everyone."""
        path = self.work / f"ids-{of}.safetensors"
        generator = torch.Generator().manual_seed(1)
        size = 4096 if of == "pgdoc" else 128
        save_file({"ids": torch.randint(3, size, (8, 64), generator=generator)}, path)
        return path

    def ask(self, *arguments: str) -> dict[str, Any]:
        """One step in the peer's environment; its last line is JSON."""
        command = [self.peer, str(HERE / "peer_auto_round.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.work)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise RuntimeError(lines[-1][:200])
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    def run(self, case: Case) -> Outcome:
        try:
            directory = self.make(case)
        except RuntimeError as error:
            return Outcome(case, error=str(error))
        ids, where = self.ids(case.of), self.work / "logits.safetensors"
        ours, count = _ours(directory, ids)
        own = json.loads((directory / "config.json").read_text())["quantization_config"]
        packing = own.get("packing_format", "")
        plain, _ = _ours(self.source(case.of), ids)
        known = Outcome(
            case, packing, count, effect=float(_relative(ours, plain).max()),
            repacked=case.direction == "ours" or _same_bytes(directory, own),
        )  # fmt: skip
        try:
            answer = self.ask("logits", str(directory), str(where), str(ids))
        except RuntimeError as error:
            return replace(known, error=str(error))
        away = _relative(load_file(where)["logits"], ours)
        return replace(
            known, theirs=sum(answer["modules"].values()),
            difference=float(away.flatten().quantile(0.99)), largest=float(away.max()),
        )  # fmt: skip

    def make(self, case: Case) -> Path:
        """The quantized directory, by whom the case says."""
        out = self.work / f"{case.direction}-{case.name}".replace(" ", "_")
        source = self.source(case.of)
        if case.direction == "ours":
            recipe = build_recipe(None, {"iters": 0} | case.options)
            pipeline.quantize(recipe, pipeline.Source(source, torch.device("cpu")), out)
            return out
        options = json.dumps({"scheme": "W4A16"} | case.options)
        made = self.ask("export", str(source), str(out), options, str(self.ids(case.of)))
        return resolve(made["directory"])


@torch.no_grad()
def _ours(directory: Path, ids: Path) -> tuple[torch.Tensor, int]:
    model = autoround.load(directory, dtype=torch.float32)
    count = sum(isinstance(m, QLinear | QExperts) for m in model.modules())
    return model(input_ids=load_file(ids)["ids"], use_cache=False).logits, count


def _relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest difference of each token's logits, over the largest logit of all."""
    return (a - b).abs().amax(-1) / b.abs().max()


def _same_bytes(directory: Path, own: dict[str, Any]) -> bool:
    """Read every module by our reader and pack it by our writer: the file's tensors again."""
    files = Quantized(directory)
    contents = files.contents()
    rows = FORMATS["auto_round"].packings
    packing = next(row for row in rows if row.name == own["packing_format"])
    for module in contents.modules.values():
        again = packing.pack(files.q(module.name), module, contents)
        stored = files.parts(module.name)
        if any(not torch.equal(tensor, stored[part]) for part, tensor in again.items()):
            return False
    return bool(contents.modules)


def outcomes(peer: str, work: Path, word: str = "") -> Iterator[Outcome]:
    """Run the cases whose direction and name hold ``word``."""
    bench = Bench(peer, work)
    for case in CASES:
        if word in f"{case.direction} {case.name}":
            yield bench.run(case)


def main() -> int:
    """Print the table; 1 if a case is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the peer already")
    parser.add_argument("--filter", default="", help="only cases holding this")
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bad = 0
        peer = given.peer_python or _peer.environment("auto-round")
        for o in outcomes(str(peer.absolute()), work.absolute(), given.filter):
            bad += o.verdict == "FAIL"
            print(json.dumps(asdict(o)) if given.json else _row(o), flush=True)
    return int(bad > 0)


def _row(o: Outcome) -> str:
    figures = f"p99 {o.difference:.1e}  max {o.largest:.1e}  (quantization {o.effect:.1e})"
    bytes_ = "" if o.case.direction == "ours" else f"  same bytes: {o.repacked}"
    note = o.case.peer_cannot if o.verdict == "peer" else o.error
    where = f"{o.case.direction:6} {o.case.name:18} {o.packing:20}"
    return f"{o.verdict:4} {where} {o.ours:2}/{o.theirs:2} modules  {figures}{bytes_}  {note}"


if __name__ == "__main__":
    raise SystemExit(main())
