# SPDX-License-Identifier: Apache-2.0
"""One job with autoround: MODEL TOKENS OUTPUT CHANGES-AS-JSON; prints JSON last."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from autoround.options import build_recipe
from autoround.run.pipeline import quantize
from autoround.run.record import Source, peak_bytes


def main() -> None:
    """Run the job of the command line."""
    model, tokens, output, given = sys.argv[1:]
    changes = json.loads(given)
    ids = load_file(tokens)["ids"]
    low = changes.pop("low_cpu_mem_usage", False)
    recipe = build_recipe(changes.pop("recipe", None), changes)
    if recipe.calibrates:
        count = min(len(ids), recipe.nsamples)
        recipe = replace(recipe, nsamples=count, seqlen=ids.shape[1])
    source = Source(model, torch.empty(0).device, low_cpu_mem_usage=low)
    before = time.process_time()
    run = quantize(recipe, source, Path(output), dataset=[*ids[: recipe.nsamples]])
    cpu = time.process_time() - before
    made = {"seconds": run.seconds, "cpu": cpu, "peak": peak_bytes()}
    print(json.dumps(made | {"directory": output}))


main()
