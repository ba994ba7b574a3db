# SPDX-License-Identifier: Apache-2.0
"""One tuning job with autoround: MODEL TOKENS OUTPUT BITS GROUP ITERS BATCH; prints JSON last."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from autoround.options import build_recipe
from autoround.pipeline import quantize
from autoround.run import Source, peak_bytes


def main() -> None:
    """Run the job of the command line."""
    model, tokens, output, *numbers = sys.argv[1:]
    bits, group_size, iters, batch_size = map(int, numbers)
    ids = load_file(tokens)["ids"]
    changes = {"bits": bits, "group_size": group_size, "iters": iters}
    if iters:
        changes |= {"batch_size": batch_size, "nsamples": len(ids), "seqlen": ids.shape[1]}
    recipe = build_recipe(None, changes)
    source = Source(model, torch.empty(0).device)
    run = quantize(recipe, source, Path(output), dataset=list(ids))
    print(json.dumps({"seconds": run.seconds, "peak": peak_bytes(), "directory": output}))


main()
