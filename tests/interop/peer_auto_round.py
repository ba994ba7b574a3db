# SPDX-License-Identifier: Apache-2.0
"""Runs inside the peer's environment: exports with Intel's auto-round, or loads and answers.

python peer_auto_round.py export MODEL OUT '{"bits": 4, "iters": 0, ...}' IDS.safetensors
python peer_auto_round.py logits DIRECTORY OUT.safetensors IDS.safetensors
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def export(model: str, out: str, options: str, ids_file: str) -> None:
    """Quantize with Intel's tool; prints the directory it made."""
    from auto_round import AutoRound

    own = json.loads(options)
    ids = load_file(ids_file)["ids"]
    own |= {"dataset": [row[None] for row in ids], "nsamples": len(ids)}
    own |= {"seqlen": ids.shape[1], "batch_size": 4}
    tokenizer = AutoTokenizer.from_pretrained(model)
    job = AutoRound(model, tokenizer, device_map="cpu", **own)
    job.quantize_and_save(out, format="auto_round")
    print(json.dumps({"directory": str(next(Path(out).rglob("config.json")).parent)}))


@torch.no_grad()
def logits(directory: str, out: str, ids_file: str) -> None:
    """Load through transformers with auto_round present; f32 logits to a file."""
    import auto_round  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    kinds = Counter(
        type(m).__name__ for m in model.modules() if hasattr(m, "qweight") or hasattr(m, "qzeros")
    )
    found = model(input_ids=load_file(ids_file)["ids"], use_cache=False).logits.float()
    save_file({"logits": found.contiguous()}, out)
    print(json.dumps({"modules": dict(kinds)}))


if __name__ == "__main__":  # its model-free path starts processes
    {"export": export, "logits": logits}[sys.argv[1]](*sys.argv[2:])
