# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time against depth: one width, growing depth, ours and auto-round's."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._peer import environment

HERE = Path(__file__).parent
MB = 1e6
SMALL = {"batch_size": 4}
OURS, INTEL = "own.py", "intel_auto_round.py"
#: Column -> the script of ``peers`` that runs, and what is asked of it.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "RTN": (OURS, {"iters": 0}),
    "closed form": (OURS, SMALL),
    "the same, low memory": (OURS, SMALL | {"low_cpu_mem_usage": True}),
    "2 steps": (OURS, SMALL | {"iters": 2}),
    "auto-round, 2 steps": (INTEL, SMALL | {"iters": 2}),
    "auto-round": (INTEL, {}),
}


def main(argv: list[str]) -> None:
    """Quantize random Llama checkpoints of growing depth; peak memory must stay where it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=main.__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/memory"))
    o = parser.parse_args(argv)
    if any(RUNS[name][0] == INTEL for name in o.runs):
        environment("auto-round")
    o.output.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(0, 1024, (o.nsamples, o.seqlen), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, o.output / "tokens.safetensors")
    table = Table("blocks", "checkpoint", *(f"{name}: peak, CPU" for name in o.runs))
    for depth in o.depths:
        where = o.output / f"llama-{depth}"
        size = _checkpoint(where, o.hidden, depth)
        cells = [_cost(where, o.output / f"out-{depth}", *RUNS[name]) for name in o.runs]
        table.add_row(str(depth), f"{size / MB:.0f} MB", *cells)
    Console().print(table)


def _checkpoint(where: Path, hidden: int, depth: int) -> int:
    """A random bf16 Llama on disk; its bytes."""
    shutil.rmtree(where, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(where)
    for file in (HERE / "models" / "pgdoc").glob("tokenizer*"):  # nobody uses it; the peer asks
        shutil.copy(file, where)
    return sum(f.stat().st_size for f in where.glob("*.safetensors"))


def _cost(model: Path, output: Path, script: str, asked: Mapping[str, Any]) -> str:
    """Resident bytes at most, and processor seconds, of one quantization in its own process."""
    shutil.rmtree(output, ignore_errors=True)
    python = sys.executable if script == OURS else str(environment("auto-round").absolute())
    words = [str(model), str(output.parent / "tokens.safetensors"), str(output), json.dumps(asked)]
    command = [python, str(HERE / "peers" / script), *words]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    made: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return f"{made['peak'] / MB:.0f} MB, {made['cpu']:.0f} s"
