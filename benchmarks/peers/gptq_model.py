# SPDX-License-Identifier: Apache-2.0
"""One job with GPTQModel, in its own environment: MODEL TOKENS OUTPUT CHANGES-AS-JSON."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

#: Its pools of threads refuse a machine of two cores ("requests 2 workers but parent has 1").
LEAST_CORES = 4


def main() -> None:
    """Run the job of the command line."""
    cores = max(LEAST_CORES, os.cpu_count() or 1)
    os.cpu_count = lambda: cores
    from gptqmodel import GPTQModel, QuantizeConfig

    model, tokens, output, given = sys.argv[1:]
    asked = json.loads(given)
    asked.pop("scheme")
    ids = load_file(tokens)["ids"]
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    started, before = time.perf_counter(), sum(os.times()[:4])
    job = GPTQModel.load(model, QuantizeConfig(device="cpu", **asked))
    job.quantize(rows, batch_size=1)
    job.save(output)
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - before
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "directory": output}))


main()
