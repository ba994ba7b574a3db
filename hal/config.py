# SPDX-License-Identifier: Apache-2.0
"""The environment switches, all of them. Read at each decision, so that tests can set them."""

import os


def backend() -> str:
    """``HAL_BACKEND``: serve everything from this backend only (``reference``, ``cpu``, ...)."""
    return os.environ.get("HAL_BACKEND", "")


def kernel() -> str:
    """``HAL_KERNEL``: only kernels whose name matches this glob, and the reference."""
    return os.environ.get("HAL_KERNEL", "")


def isa() -> str:
    """``HAL_ISA``: the instruction set native CPU code may use (``scalar``, ``avx2``, ...)."""
    return os.environ.get("HAL_ISA", "")
