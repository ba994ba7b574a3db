# SPDX-License-Identifier: Apache-2.0
"""Device layer: uniform quantize, pack and dequant-GEMM verbs over swappable kernels."""

from hal import compile as _operators  # noqa: F401 (registers them)
from hal.backends import backend_names
from hal.block import Attention, BlockOps, block_ops
from hal.config import only
from hal.device import Device, devices
from hal.nn import QExperts, QLinear
from hal.ops import (
    dequantize,
    describe,
    hadamard_,
    join,
    pack,
    prepare,
    qdq,
    qdq_step_,
    qgemm,
    qgemm_grouped,
    quantize,
    quantize_act,
    refuse,
    restore,
    search,
    settle,
)
from hal.plan import Weight, plan_kernels
from hal.qtensor import Params, Part, QTensor
from hal.registry import Caps, Case, Kernel, Unsupported, explain
from hal.spec import Act, Spec

__all__ = [
    "Act",
    "Attention",
    "BlockOps",
    "Caps",
    "Case",
    "Device",
    "Kernel",
    "Params",
    "Part",
    "QExperts",
    "QLinear",
    "QTensor",
    "Spec",
    "Unsupported",
    "Weight",
    "backend_names",
    "block_ops",
    "dequantize",
    "describe",
    "devices",
    "explain",
    "hadamard_",
    "join",
    "only",
    "pack",
    "plan_kernels",
    "prepare",
    "qdq",
    "qdq_step_",
    "qgemm",
    "qgemm_grouped",
    "quantize",
    "quantize_act",
    "refuse",
    "restore",
    "search",
    "settle",
]
