# SPDX-License-Identifier: Apache-2.0
"""transformers with compressed-tensors: models run as it runs them, weights as it decompresses."""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serve import Answer, kinds, serve
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def _model(directory: str) -> tuple[Any, str]:
    """The plain call; where that fails, the one its message or its documentation sends users to."""
    given: dict[str, Any] = {"dtype": torch.float32}
    try:
        return AutoModelForCausalLM.from_pretrained(directory, **given).eval(), ""
    except Exception:
        own = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=own, **given)
        return model.eval(), "dequantize=True"


@torch.no_grad()
def load(directory: str, ids: str) -> Answer:
    model, how = _model(directory)
    served = {how: 1} if how else kinds(model.modules(), ("weight_packed", "weight_scale"))
    logits = model(input_ids=load_file(ids)["ids"], use_cache=False).logits.float().contiguous()
    # The first forward decompresses.
    dense = {
        f"dense {name}": m.weight.float().contiguous()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and hasattr(m, "weight")
    }
    return {"logits": logits, **dense}, served


if __name__ == "__main__":
    serve(load, save_file)
