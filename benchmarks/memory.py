# SPDX-License-Identifier: Apache-2.0
"""Peak memory against depth: the same width with 4 and with 16 blocks, quantized by the command."""

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

HERE = Path(__file__).parent
MB = 1e6
SMALL = {"batch_size": 4}
#: Column -> what is asked of the run.
RUNS: dict[str, dict[str, Any]] = {
    "RTN": {"iters": 0},
    "closed form": SMALL,
    "the same, low memory": SMALL | {"low_cpu_mem_usage": True},
    "2 steps": SMALL | {"iters": 2},
}


def main(argv: list[str]) -> None:
    """Quantize random Llama checkpoints of growing depth; peak memory must stay where it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=main.__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/memory"))
    o = parser.parse_args(argv)
    table = Table("blocks", "checkpoint", "imports", *(f"peak, {name}" for name in RUNS))
    for depth in o.depths:
        where = o.output / f"llama-{depth}"
        size = _checkpoint(where, o.hidden, depth)
        found = [_peak(where, o.output / f"out-{depth}", asked) for asked in RUNS.values()]
        sizes = (size, found[0]["start"], *(run["peak"] for run in found))
        table.add_row(str(depth), *(f"{n / MB:.0f} MB" for n in sizes))
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
    return sum(f.stat().st_size for f in where.glob("*.safetensors"))


def _peak(model: Path, output: Path, asked: Mapping[str, Any]) -> dict[str, int]:
    """Resident bytes before one quantization and at most, in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    tokens = output.parent / "tokens.safetensors"
    _tokens(tokens)
    words = [str(model), str(tokens), str(output), json.dumps(asked)]
    command = [sys.executable, str(HERE / "peers" / "own.py"), *words]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    sizes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def _tokens(path: Path) -> None:
    ids = torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, path)
