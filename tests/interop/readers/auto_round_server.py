# SPDX-License-Identifier: Apache-2.0
"""transformers with Intel's auto-round present: its loader, and the kernels that it picks."""

import auto_round  # noqa: F401
import torch
from safetensors.torch import load_file, save_file
from serve import Answer, kinds, serve
from transformers import AutoModelForCausalLM


@torch.no_grad()
def load(directory: str, ids: str) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    served = kinds(model.modules(), ("qweight", "qzeros", "weight_packed"))
    rows = load_file(ids)["ids"]
    return {"logits": model(input_ids=rows, use_cache=False).logits.float().contiguous()}, served


if __name__ == "__main__":
    serve(load, save_file)
