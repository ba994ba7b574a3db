# SPDX-License-Identifier: Apache-2.0
"""transformers' GPTQ and AWQ, which hand the layers to GPTQModel's kernels through optimum."""

import torch
from safetensors.torch import load_file, save_file
from serve import Answer, kinds, serve
from transformers import AutoModelForCausalLM


@torch.no_grad()
def load(directory: str, ids: str) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = load_file(ids)["ids"]
    served = kinds(model.modules(), ("qweight",))
    return {"logits": model(input_ids=rows, use_cache=False).logits.float().contiguous()}, served


if __name__ == "__main__":
    serve(load, save_file)
