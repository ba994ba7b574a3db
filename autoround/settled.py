# SPDX-License-Identifier: Apache-2.0
"""Choices of the known tool that are no choice here: each is taken, and what holds is said."""

#: Option -> what holds in every run, whether it is given or not.
SETTLED = {
    "low_gpu_mem_usage": "a device holds one block and the batch at work, no more",
    "enable_deterministic_algorithms": "the same command writes the same bytes",
    "enable_torch_compile": "rounding and products are native kernels",
    "disable_torch_compile": "nothing is compiled",
}


def settled(name: str) -> str:
    """What to tell somebody who gave an option of SETTLED; follows its name."""
    return f"changes nothing: in every run {SETTLED[name]}"
