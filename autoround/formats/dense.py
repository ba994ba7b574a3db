# SPDX-License-Identifier: Apache-2.0
"""`fake`: the dequantized weights in an ordinary checkpoint; what every other format is held to."""

from typing import Any

import torch

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.row import Packing, Parts, Shapes, furthest
from autoround.formats.sink import FLOATS, TORCH
from hal import QTensor


def _stored(dtype: torch.dtype | None, module: Module, contents: Contents) -> Shapes:
    n, k = module.shape
    own = TORCH[contents.tensors[module.key].dtype]
    return {"weight": (dtype or own, (k, n) if module.transposed else (n, k))}


def _pack(dtype: torch.dtype | None, q: QTensor, module: Module, contents: Contents) -> Parts:
    own = TORCH[contents.tensors[module.key].dtype]
    w = hal.dequantize(q, dtype=dtype or own)
    return {"weight": w.t().contiguous() if module.transposed else w}


def _loss(q: QTensor, parts: Parts) -> float:
    w = parts["weight"]
    return furthest(w if w.shape == q.shape else w.t(), hal.dequantize(q, dtype=torch.float32))


OWN = Packing(
    "dense",
    lambda module: None,
    lambda module, contents: _stored(None, module, contents),
    lambda q, module, contents: _pack(None, q, module, contents),
    _loss,
)
F32 = Packing(
    "dense",
    lambda module: None,
    lambda module, contents: _stored(torch.float32, module, contents),
    lambda q, module, contents: _pack(torch.float32, q, module, contents),
)


def refuse(contents: Contents) -> str | None:
    """A dense model has its experts as its own code wants them."""
    if not contents.stacks:
        return None
    return f"the model has its experts as one tensor, {contents.stacks[0]}, not one by one"


def no_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """An ordinary model."""
    return {}


def f32_config(contents: Contents, packing: Packing) -> dict[str, Any]:
    """An ordinary model in f32."""
    return {"torch_dtype": "float32"}


def f32(dtype: str, contents: Contents) -> str:
    """Every float in f32."""
    return "F32" if dtype in FLOATS else dtype
