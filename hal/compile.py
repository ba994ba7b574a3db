# SPDX-License-Identifier: Apache-2.0
"""Products as operators of torch, so that ``torch.compile`` keeps them whole.

A graph holds tensors and numbers only: a weight travels as its ``token``. The weight must stay
alive as long as code compiled for it runs; a module that owns both does that by itself.
"""

from typing import Any

import torch
from torch import Tensor

from hal import ops
from hal.plan import WEIGHTS, Weight

_library: Any = torch.library  # has no types of its own
_LIBRARY = _library.Library("hal", "DEF")
_LIBRARY.define("qgemm(Tensor x, int weight, Tensor? bias) -> Tensor")
_LIBRARY.define("qgemm_grouped(Tensor x, int weight, Tensor offsets) -> Tensor")


def _weight(token: int) -> Weight:
    found = WEIGHTS.get(token)
    if found is None:
        raise RuntimeError(f"hal weight {token} is gone: compiled code outlived its module")
    return found


def _qgemm(x: Tensor, weight: int, bias: Tensor | None) -> Tensor:
    return ops.qgemm(x, _weight(weight), bias)


def _qgemm_grouped(x: Tensor, weight: int, offsets: Tensor) -> Tensor:
    return ops.qgemm_grouped(x, _weight(weight), offsets)


def _fake_qgemm(x: Tensor, weight: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], _weight(weight).shape[0])


def _fake_qgemm_grouped(x: Tensor, weight: int, offsets: Tensor) -> Tensor:
    w = _weight(weight)
    return x.new_empty(x.shape[0], w.shape[0] // w.experts)


_LIBRARY.impl("qgemm", _qgemm, "CompositeExplicitAutograd")
_LIBRARY.impl("qgemm_grouped", _qgemm_grouped, "CompositeExplicitAutograd")
_library.register_fake("hal::qgemm", _fake_qgemm, lib=_LIBRARY)
_library.register_fake("hal::qgemm_grouped", _fake_qgemm_grouped, lib=_LIBRARY)
