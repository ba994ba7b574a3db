# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compiled for GPUs that are not here, exactly as their launchers call them."""

import inspect
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

#: Target: what a program may have of shared memory, in bytes.
TARGETS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One launch: the kernel, its arguments by name, its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).strip("_")


@dataclass(frozen=True, slots=True)
class Built:
    """Bytes of shared memory and of stack (spilled registers), registers of a thread."""

    shared: int
    stack: int
    registers: int


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches within are noted and not made."""
    calls: list[Call] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        options = {name: value for name, value in kwargs.items() if name not in names}
        own = {name: value for name, value in kwargs.items() if name in names}
        bound = inspect.signature(kernel.fn).bind(*args, **own).arguments
        calls.append(Call(kernel, dict(bound), options))

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield calls
    finally:
        JITFunction.run = before


def build(call: Call, target: str) -> Built:
    """Compile for a target: ``sm_90``, ``gfx942``. Raises what the compiler raises."""
    signature, constants, attributes = {}, {}, {}
    parameters = {p.name: p for p in call.kernel.params}
    for index, (name, value) in enumerate(call.arguments.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameters[name].is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constants, attributes)
    if target.startswith("gfx"):
        done = triton.compile(source, target=GPUTarget("hip", target, 64), options=call.options)
        text = done.asm["amdgcn"]
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        return Built(done.metadata.shared, stack, registers)
    arch = int(target.removeprefix("sm_"))
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)
    return Built(done.metadata.shared, *_resources(done.asm["cubin"]))


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    file = Path("/tmp") / f"{hash(cubin)}.cubin"
    file.write_bytes(cubin)
    try:
        text = subprocess.run(
            [tool, "-res-usage", file], check=True, capture_output=True, text=True
        ).stdout
    finally:
        file.unlink()
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[2]), int(found[1])
