# SPDX-License-Identifier: Apache-2.0
"""`load`: a finished directory as a transformers model on our kernels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import dispatch_model
from torch import nn
from transformers.utils import logging

import hal
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError, about, blamed
from autoround.integrations import FAST, hook
from autoround.models import BlockList, compat, find_blocks
from autoround.options import DeviceMap, devices_by_name, layers_by_device
from hal.device import spread

ANEW = "take it from the model again"
#: How products may be computed -> ``backend`` of transformers' AutoRoundConfig.
COMPUTE = {"exact": "auto", "fast": FAST}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap = None,
    compute: str = "exact",
) -> Any:
    """The model in ``path`` (quantized or not), in eval mode, by the class its config names.

    ``device_map``: one device (None = the first), several (``0,1``: blocks are spread over them by
    their memory), or layers to devices. ``dtype`` None = the checkpoint's own. Quantized layers run
    on `hal.qgemm`. ``compute``: ``exact``, or ``fast`` = activations in 8 bits, a scale per group,
    where that is faster (a few rows). Raises InputError for a directory that is no model.
    """
    if compute not in COMPUTE:
        raise InputError(f"compute={compute!r}: choose {' or '.join(COMPUTE)}")
    hook.install()
    where = resolve(str(path))
    if not (where / "config.json").is_file():
        raise InputError(f"{where} has no config.json; give the directory of a finished model")
    checkpoint = Checkpoint(where, quantized=True)
    config = compat.load_config(str(where), trust_remote_code=False)
    if quantized := checkpoint.quantization:
        # Whatever program wrote them: our kernels read the files, not the config.
        named = quantized if quantized.get("quant_method") == "auto-round" else {}
        packing = named.get("packing_format", "auto_round")
        config.quantization_config = {
            "quant_method": "auto-round", "packing_format": packing, "backend": COMPUTE[compute]
        }  # fmt: skip
    kind = compat.model_class(config) or transformers.AutoModelForCausalLM
    try:
        with _without_bar(), about(where):
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
    return _placed(model, device_map).eval()


def _placed(model: Any, device_map: DeviceMap) -> Any:
    """The model on its device, or its blocks on several: on those they are given, or spread."""
    named = devices_by_name(device_map)
    blocks = find_blocks(model)
    given = {
        layer: devices_by_name(device)[0] for layer, device in layers_by_device(device_map).items()
    }
    if len(named) == 1:
        return model.to(named[0])
    sizes = [_bytes(module) for module in blocks.modules]
    where = dict(zip(blocks.names, spread(sizes, named), strict=True))
    places = {name: _given(name, given) or device for name, device in where.items()}
    for name, child in _around(model, blocks):
        child.to(places.setdefault(name, _given(name, given) or named[0]))
    return dispatch_model(model, places, main_device=named[0], force_hooks=True)


def _given(name: str, given: Mapping[str, torch.device]) -> torch.device | None:
    """The device of the longest name or pattern that covers a module."""
    found = [x for x in given if not x or fnmatch(name, x) or f"{name}.".startswith(f"{x}.")]
    return given[max(found, key=len)] if found else None


def _around(model: nn.Module, blocks: BlockList) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that hold none of the blocks."""
    waiting = list(model.named_children())
    while waiting:
        name, module = waiting.pop(0)
        if name == blocks.name:
            continue
        if f"{blocks.name}.".startswith(f"{name}."):
            waiting += [(f"{name}.{own}", child) for own, child in module.named_children()]
        else:
            yield name, module


def _bytes(module: nn.Module) -> int:
    weights: list[Any] = [getattr(m, "weight", None) for m in module.modules()]
    packed = sum(w.nbytes for w in weights if isinstance(w, hal.Weight))
    return packed + sum(p.nbytes for p in module.parameters())


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


@contextmanager
def running(model: Any) -> Iterator[None]:
    """A model's own code on tokens: settings that contradict each other fail anywhere in there.

    Raises InputError with the directory it was loaded from.
    """
    file = f"{model.config.name_or_path}/config.json"
    with blamed(f"{file}: {type(model).__name__} does not run with it", ANEW):
        yield
