# SPDX-License-Identifier: Apache-2.0
"""mlx-lm on the CPU: a forward of all rows, and mx.dequantize of every weight."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn import QuantizedLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file
from serve import Answer, serve


def load(directory: str, ids: str) -> Answer:
    model, _ = load_model(Path(directory))
    rows = mx.array(load_file(ids)["ids"].astype(np.int32))
    tensors = {"logits": np.array(model(rows).astype(mx.float32))}
    served: Counter[str] = Counter()
    for name, m in model.named_modules():
        if isinstance(m, (QuantizedLinear, QuantizedSwitchLinear)):
            served[f"{type(m).__name__} {m.bits}"] += 1
            # In f32, so that only what is stored counts, not the rounding of a product.
            scales, biases = m.scales.astype(mx.float32), m.biases.astype(mx.float32)
            dense = mx.dequantize(m.weight, scales, biases, m.group_size, m.bits)
            tensors[f"dense {name}"] = np.array(dense)
    return tensors, dict(served)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    serve(load, save_file)
