# SPDX-License-Identifier: Apache-2.0
"""`load`: a finished directory as a transformers model on our kernels."""

from pathlib import Path
from typing import Any

import torch
import transformers

from autoround.errors import InputError
from autoround.integrations import hook
from autoround.models import resolve
from hal import device as devices


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device_map: str | int | None = None
) -> Any:
    """The model in ``path`` (quantized or not), in eval mode, by the class its config names.

    ``dtype`` None = the checkpoint's own. Quantized layers run on `hal.qgemm`. Raises InputError
    for a directory that is no model.
    """
    hook.install()
    where = resolve(str(path))
    if not (where / "config.json").is_file():
        raise InputError(f"{where} has no config.json; give the directory of a finished model")
    config = transformers.AutoConfig.from_pretrained(str(where), local_files_only=True)
    names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    kind = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    model: Any = kind.from_pretrained(
        str(where), dtype=dtype or "auto", local_files_only=True, use_safetensors=True
    )
    return model.to(devices.resolve(device_map)).eval()
