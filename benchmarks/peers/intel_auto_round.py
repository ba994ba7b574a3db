# SPDX-License-Identifier: Apache-2.0
"""One job with Intel's auto-round, in its own environment: MODEL TOKENS OUTPUT CHANGES-AS-JSON."""

import json
import os
import sys
import time
from pathlib import Path

from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer


def main() -> None:
    """Run the job of the command line."""
    model, tokens, output, given = sys.argv[1:]
    ids = load_file(tokens)["ids"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    started, before = time.perf_counter(), sum(os.times()[:4])
    job = AutoRound(
        model,
        tokenizer,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[row[None] for row in ids],
        device_map="cpu",
        **json.loads(given),
    )
    job.quantize_and_save(output, format="auto_round")
    seconds = time.perf_counter() - started
    cpu = sum(os.times()[:4]) - before  # with the compiler that it starts
    found = next(Path(output).rglob("config.json")).parent
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    made = {"seconds": seconds, "cpu": cpu, "peak": peak, "directory": str(found)}
    print(json.dumps(made))


main()
