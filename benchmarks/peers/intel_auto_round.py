# SPDX-License-Identifier: Apache-2.0
"""One tuning job with Intel's auto-round, run in its own environment: the same words as own.py."""

import json
import sys
import time
from pathlib import Path

from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer


def main() -> None:
    """Run the job of the command line."""
    model, tokens, output, *numbers = sys.argv[1:]
    bits, group_size, iters, batch_size = map(int, numbers)
    ids = load_file(tokens)["ids"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    started = time.perf_counter()
    job = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=bits,
        group_size=group_size,
        iters=iters,
        batch_size=batch_size,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[row[None] for row in ids],
        device_map="cpu",
    )
    job.quantize_and_save(output, format="auto_round")
    seconds = time.perf_counter() - started
    found = next(Path(output).rglob("config.json")).parent
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak, "directory": str(found)}))


main()
