# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's own loader on the CPU, with the kernel it picks there."""

import torch
from gptqmodel import GPTQModel
from safetensors.torch import load_file, save_file
from serve import Answer, kinds, serve


@torch.no_grad()
def load(directory: str, ids: str) -> Answer:
    model = GPTQModel.load(directory, device="cpu", dtype=torch.float32).model.eval()
    rows = load_file(ids)["ids"]
    served = kinds(model.modules(), ("qweight",))
    return {"logits": model(input_ids=rows, use_cache=False).logits.float().contiguous()}, served


if __name__ == "__main__":
    serve(load, save_file)
