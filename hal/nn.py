# SPDX-License-Identifier: Apache-2.0
"""A linear layer over `hal.qgemm`, for runtimes that want modules."""

import torch
from torch import Tensor, nn

from hal.ops import prepare, qgemm
from hal.plan import Weight
from hal.qtensor import QTensor


class QLinear(nn.Module):
    """``y = x @ w.T + bias`` with a quantized ``w [N, K]``.

    Born holding the tensors of a file layout as buffers (so that any loader can fill them); the
    first forward, or `ready`, turns them into a `Weight` for the activations' dtype and device and
    frees them.
    """

    def __init__(self, empty: QTensor, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.shape, self.layout = empty.spec, empty.shape, empty.layout
        self.out_features, self.in_features = empty.shape
        self.weight_ready: Weight | None = None
        for name, tensor in empty.parts.items():
            self.register_buffer(name, tensor)
        self.part_names = tuple(empty.parts)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.empty(self.out_features, dtype=dtype) if bias else None)

    def qtensor(self) -> QTensor:
        """The weight as it lies in the buffers."""
        parts = {name: self.get_buffer(name) for name in self.part_names}
        return QTensor(self.spec, self.shape, self.layout, parts)

    def ready(self, dtype: torch.dtype) -> Weight:
        """Prepare once for ``dtype``; the file-layout buffers are freed."""
        if self.weight_ready is None:
            self.weight_ready = prepare(self.qtensor(), dtype=dtype)
            for name in self.part_names:
                setattr(self, name, None)
        return self.weight_ready

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_ready
        return qgemm(x, w if w is not None else self.ready(x.dtype), self.bias)

    def extra_repr(self) -> str:
        rows = self.weight_ready.kernels if self.weight_ready else ()
        names = ", ".join(dict.fromkeys(row.name for _, row in rows)) or self.layout
        return f"{self.in_features} -> {self.out_features}, {self.spec}, {names}"
