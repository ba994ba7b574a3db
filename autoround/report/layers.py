# SPDX-License-Identifier: Apache-2.0
"""The error of each quantized layer: of its weights, and of what it puts out on held-out text."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hal
from autoround.checkpoint import Checkpoint
from autoround.evaluate import Pair
from autoround.formats import Quantized
from autoround.header import BITS
from autoround.inference.loading import running
from hal import QTensor


@dataclass(frozen=True, slots=True)
class Layer:
    """``bits``: stored bits a weight, scales and zero levels included; 16 and the like = kept.

    Errors are relative Frobenius norms: of the weights, ``|W - Q| / |W|``, and of the outputs on
    one sample of held-out text as the float model computes it, ``|X (W - Q)'| / |X W'|``; ``rtn``:
    the same for W rounded to nearest in the same code. None: kept, or the float model has no such
    layer (experts that it fuses).
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    nbytes: int
    weight_error: float | None = None
    output_error: float | None = None
    output_error_rtn: float | None = None


def measure(files: Quantized, pair: Pair, ids: Tensor | None) -> list[Layer]:
    """Every matrix of a directory, in its order. ``ids [1, L]``: None = no outputs are compared."""
    source = Checkpoint(pair.source)
    linears = {} if ids is None else _linears(pair.reference)
    found: dict[str, Layer] = {}
    with ExitStack() as stack:
        outputs: dict[str, tuple[float, float]] = {}
        for name in files.modules:
            q = files.q(name)
            found[name] = _layer(name, q, _float(source, name, q.shape))
            module = linears.get(name)
            if module is not None and tuple(module.weight.shape) == q.shape:
                hook = _Hook(name, files, outputs)
                stack.callback(module.register_forward_hook(hook).remove)
        if ids is not None and linears:
            with torch.inference_mode(), running(pair.reference):
                pair.reference(input_ids=ids.to(pair.reference.device))
        for name, (own, rtn) in outputs.items():
            found[name] = _with(found[name], own, rtn)
    return [*found.values(), *_kept(files)]


@dataclass(frozen=True, slots=True)
class _Hook:
    """Compares outputs where the float model computes them, one layer at a time."""

    name: str
    files: Quantized
    outputs: dict[str, tuple[float, float]]

    def __call__(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].flatten(0, -2).float()
        w = module.weight.float()
        q = self.files.q(self.name)
        size = float((x @ w.t()).norm())
        if not size:
            return
        rounded = hal.quantize(w, hal.search(w, q.spec), q.spec)
        errors = [float((x @ (w - _dense(one).to(w)).t()).norm()) / size for one in (q, rounded)]
        self.outputs[self.name] = (errors[0], errors[1])


def _dense(q: QTensor) -> Tensor:
    return hal.dequantize(q, dtype=torch.float32)


def _linears(model: Any) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _float(source: Checkpoint, name: str, shape: tuple[int, int]) -> Tensor | None:
    """The float weight ``[N, K]`` f32, where the source has one of this name and shape."""
    entry = source.entries.get(f"{name}.weight")
    if entry is None or entry.shape not in (shape, shape[::-1]) or BITS[entry.dtype] < 16:
        return None
    w = source.get(f"{name}.weight").float()
    return w if entry.shape == shape else w.t()


def _layer(name: str, q: QTensor, w: Tensor | None) -> Layer:
    bits, (n, k) = q.spec.bits_per_weight(q.shape[1]), q.shape
    error = None
    if w is not None and (size := float(w.norm())):
        error = float((w - _dense(q)).norm()) / size
    return Layer(name, q.shape, str(q.spec), bits, round(n * k * bits / 8), error)


def _with(layer: Layer, own: float, rtn: float) -> Layer:
    values = (layer.name, layer.shape, layer.scheme, layer.bits, layer.nbytes, layer.weight_error)
    return Layer(*values, own, rtn)


def _kept(files: Quantized) -> Iterator[Layer]:
    """Matrices that stay as they are: embeddings, routers, and what was asked to stay."""
    for key, entry in files.checkpoint.entries.items():
        if key not in files.owned and len(entry.shape) > 1:
            name = key.removesuffix(".weight")
            yield Layer(name, entry.shape, entry.dtype, float(BITS[entry.dtype]), entry.nbytes)
