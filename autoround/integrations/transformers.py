# SPDX-License-Identifier: Apache-2.0
"""Loads quantized checkpoints in transformers so that every packed layer runs on `hal.qgemm`.

What is quantized is read from the shards' headers, never from the config's patterns: a layer with
packed tensors gets a quantized module, every other layer stays as it is, and a packed layer without
a home in the model is an error. The packed tensors bypass transformers' loader: they are read from
the files straight into the kernels' layout.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

import hal
from autoround import stacks
from autoround.errors import InputError
from autoround.formats import Quantized
from autoround.integrations import packed
from autoround.models import compat
from hal import QExperts, QLinear, QTensor


@dataclass(frozen=True, slots=True)
class _Swap:
    """A module to be quantized and, per weight in it, the packed modules it is made of and its
    ``[N, K]``. ``alternating``: the model wants gate and up rows of its experts in turns."""

    name: str
    weights: dict[str, tuple[list[str], tuple[int, int]]]
    alternating: bool = False


class AutoroundQuantizer(HfQuantizer):
    """transformers' hooks around loading, for ``quant_method: auto-round``."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: a device without kernels of its own is served by the reference."""
        if not self.pre_quantized:
            raise InputError("quantize with `autoround quantize`; from_pretrained only loads")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("a quantized model is loaded from a directory of safetensors files")
        self._files = Quantized(Path(checkpoint_files[0]).parent)
        self._swaps = _find_homes(model, self._files)
        dtype = model.dtype
        for swap in self._swaps:
            _replace(model, swap, dtype)
        parts = "|".join(part for part in self._files.dialect.parts if part != "weight")
        dense = "|".join(re.escape(key) for key in self._files.owned if key.endswith(".weight"))
        ignored = {rf"\.({parts})$", *([rf"^({dense})$"] if dense else [])}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), *ignored,
        }  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        fast, backend = _parse_backend(str(getattr(self.quantization_config, "backend", "auto")))
        with hal.only(backend) if backend else nullcontext():
            self._fill(model, fast)
        return model

    def _fill(self, model: Any, fast: bool) -> None:
        """Read every packed weight into its module's kernels."""
        for swap in self._swaps:
            module = model.get_submodule(swap.name)
            read = {
                leaf: packed.read(self._files, *made_of) for leaf, made_of in swap.weights.items()
            }
            if isinstance(module, QExperts):
                up, down = (read[leaf] for leaf in sorted(read, key=_order))
                up = _in_turns(up, module.experts) if swap.alternating else up
                up, down = (_experts(q, module.experts) for q in (up, down))
                module.load(up, down, model.dtype, fast=fast)
            else:
                module.load(next(iter(read.values())), model.dtype, fast=fast)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        """False: the kernels hold the only copy of the codes; copy the directory instead."""
        return False


def _parse_backend(text: str) -> tuple[bool, str]:
    """``backend`` of an AutoRoundConfig: whether 8-bit activations are allowed, and the backend of
    `hal` that serves ("" = the best, ``-name`` = any other).

    ``auto``, or ``hal:`` and ``fast``, ``NAME``, ``-NAME``, or two of them with a comma between.
    Other projects' names (``gptq:marlin``) mean ``auto``: their kernels are not ours to choose.
    """
    if not text.startswith("hal:"):
        return False, ""
    words = [word for word in text.removeprefix("hal:").split(",") if word]
    names, known = [word for word in words if word != "fast"], hal.backend_names()
    if len(names) > 1 or any(name.removeprefix("-") not in known for name in names):
        raise InputError(
            f"backend={text!r}: write hal:fast, hal:NAME or hal:-NAME; names: {', '.join(known)}"
        )
    return "fast" in words, names[0] if names else ""


def _find_homes(model: Any, files: Quantized) -> list[_Swap]:
    """The model's module for every packed module; InputError when one has none."""
    if files.tables:
        raise InputError(
            f"{files.path}: {min(files.tables)} is quantized and no linear layer; make it dense: "
            f"autoround convert {files.path} --format auto_round -o DIR"
        )
    keys = [f"{name}.weight" for name in files.modules]
    homes, lost = compat.sources(model, keys)
    made = {
        target: [key for row in zip(*source.groups, strict=True) for key in row]
        for target, source in homes.items()
    }
    stacked = stacks.regroup(lost)
    for target, source in compat.sources(model, stacked)[0].items():
        made[target] = stacked[source.keys[0]]
        lost = [key for key in lost if key not in made[target]]
    swaps: dict[str, _Swap] = {}
    for target, order in made.items():
        name, _, leaf = target.rpartition(".")
        module = model.get_submodule(name)
        swap = swaps.setdefault(name, _Swap(name, {}, not getattr(module, "is_concatenated", True)))
        names = [key.removesuffix(".weight") for key in order]
        swap.weights[leaf] = (names, _matrix_shape(module, leaf))
    head = {name for name in lost if "head" in name.rpartition(".")[0].rpartition(".")[2]}
    if rest := sorted(set(lost) - head):
        raise InputError(
            f"{len(rest)} packed layers have no home in {type(model).__name__}, first {rest[0]}; "
            "load it with the class named in its config.json"
        )
    return list(swaps.values())


def _matrix_shape(module: nn.Module, leaf: str) -> tuple[int, int]:
    """``[N, K]`` of a weight, stacked experts below each other."""
    *rows, k = getattr(module, leaf).shape
    if compat.is_conv1d(module):
        return (k, *rows)
    deep = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 3]
    if len(deep) == 2 and stacks.is_transposed(*deep):
        rows, k = [rows[0], k], rows[1]
    return math.prod(rows), k


def _replace(model: Any, swap: _Swap, dtype: torch.dtype) -> None:
    """Put a quantized module in a float one's place, still without its weights."""
    old = model.get_submodule(swap.name)
    new: nn.Module
    with torch.device("meta"):
        if isinstance(old, nn.Linear):
            new = QLinear(old.out_features, old.in_features, old.bias is not None, dtype)
        elif compat.is_conv1d(old):
            new = QLinear(old.nf, old.weight.shape[0], True, dtype)
        elif len(swap.weights) == 2:
            kind = QExperts if len(inspect.signature(old.forward).parameters) > 1 else _Sorted
            names = [f"{leaf}_bias" for leaf in sorted(swap.weights, key=_order)]
            biases = {name: b for name in names if (b := getattr(old, name, None)) is not None}
            new = kind(old.num_experts, _gate(old), biases)
        else:
            raise InputError(f"{swap.name} ({type(old).__name__}) cannot be run quantized yet")
    path, _, leaf = swap.name.rpartition(".")
    new._is_hf_initialized = True  # type: ignore[assignment]
    setattr(model.get_submodule(path), leaf, new.eval())


def _order(leaf: str) -> bool:
    """What experts are given first, then what they put out."""
    return "down" in leaf


def _gate(old: Any) -> Any:
    """The experts' own activation, bound to a copy of their settings without the weights."""
    settings = {k: v for k, v in vars(old).items() if not k.startswith("_")}
    blank: Any = object.__new__(type(old))
    nn.Module.__init__(blank)
    for name, value in settings.items():
        setattr(blank, name, value)
    blank.act_fn = getattr(old, "act_fn", None)
    if not hasattr(blank, "_apply_gate"):  # Llama 4
        return partial(_gated, old.act_fn)
    return blank._apply_gate if getattr(old, "has_gate", True) else blank.act_fn


def _gated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * act(gate)


class _Sorted(QExperts):
    """Experts that are given as many rows each, those of other experts' tokens zero (Llama 4)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        used = x.any(dim=-1)
        counts = used.view(self.experts, -1).sum(1)
        return torch.zeros_like(x).masked_scatter_(used[:, None], self.sorted(x[used], counts))


def _in_turns(q: QTensor, experts: int) -> QTensor:
    """Rows of gate and up of every expert in turns, where they lay one after the other."""
    n = q.shape[0] // experts // 2
    parts = {
        name: t.view(experts, 2, n, *t.shape[1:]).transpose(1, 2).flatten(0, 2).contiguous()
        for name, t in q.parts.items()
    }
    return replace(q, parts=parts)


def _experts(q: QTensor, experts: int) -> QTensor:
    return QTensor(q.spec, q.shape, q.layout, q.parts, experts)
