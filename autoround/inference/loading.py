# SPDX-License-Identifier: Apache-2.0
"""`load`: a finished directory as a transformers model on our kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.integrations import FAST, hook
from autoround.models import compat
from autoround.options import device_by_name

#: How products may be computed -> ``backend`` of transformers' AutoRoundConfig.
COMPUTE = {"exact": "auto", "fast": FAST}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | int | None = None,
    compute: str = "exact",
) -> Any:
    """The model in ``path`` (quantized or not), in eval mode, by the class its config names.

    ``dtype`` None = the checkpoint's own. Quantized layers run on `hal.qgemm`. ``compute``:
    ``exact``, or ``fast`` = activations in 8 bits, one scale per group, where that is faster (a few
    rows). Raises InputError for a directory that is no model.
    """
    if compute not in COMPUTE:
        raise InputError(f"compute={compute!r}: choose {' or '.join(COMPUTE)}")
    hook.install()
    where = resolve(str(path))
    if not (where / "config.json").is_file():
        raise InputError(f"{where} has no config.json; give the directory of a finished model")
    config = compat.load_config(str(where), trust_remote_code=False)
    if quantized := Checkpoint(where, quantized=True).quantization:
        # Whatever program wrote them: our kernels read the files, not the config.
        named = quantized if quantized.get("quant_method") == "auto-round" else {}
        packing = named.get("packing_format", "auto_round")
        config.quantization_config = {
            "quant_method": "auto-round", "packing_format": packing, "backend": COMPUTE[compute]
        }  # fmt: skip
    kind = compat.model_class(config) or transformers.AutoModelForCausalLM
    try:
        with _without_bar():
            model: Any = kind.from_pretrained(
                str(where),
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                config=config,
            )
    except InputError:
        raise
    except Exception as error:  # settings that contradict the tensors fail anywhere in there
        raise InputError(
            f"{where} cannot be loaded by transformers {transformers.__version__} "
            f"({type(error).__name__}: {str(error)[-300:]}); its config.json and its tensors do "
            "not fit together, or transformers is too old or too new for it"
        ) from error
    return model.to(device_by_name(device_map)).eval()


@contextmanager
def _without_bar() -> Iterator[None]:
    """No "Loading weights" bar: it would break our own lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
