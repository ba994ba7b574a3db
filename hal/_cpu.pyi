# SPDX-License-Identifier: Apache-2.0
"""Types of the module built from csrc/bind_cpu.cpp. Addresses are `Tensor.data_ptr()`."""

def isas() -> list[str]: ...

class Shape:
    def __init__(
        self,
        n: int,
        k: int,
        width: int,
        bits: int,
        symmetric: bool,
        dtype: int,
        scale_dtype: int,
        least: float,
        /,
    ) -> None: ...

class Params:
    def __init__(self, v: int, lo: int, hi: int, amin: int, amax: int, /) -> None: ...

def search(
    isa: int,
    shape: Shape,
    w: int,
    importance: int,
    factors: int,
    n_factors: int,
    amin: int,
    amax: int,
    threads: int,
    /,
) -> None: ...
def qdq(isa: int, shape: Shape, w: int, p: Params, out: int, threads: int, /) -> None: ...
def qdq_step(
    isa: int,
    shape: Shape,
    w: int,
    grad: int,
    grad_dtype: int,
    p: Params,
    lr_v: float,
    lr_range: float,
    threads: int,
    /,
) -> None: ...
def quantize(
    isa: int,
    shape: Shape,
    w: int,
    p: Params,
    codes: int,
    scale: int,
    zero: int,
    threads: int,
    /,
) -> None: ...
def dequantize(
    isa: int, shape: Shape, codes: int, scale: int, zero: int, out: int, threads: int, /
) -> None: ...
def repack(
    isa: int, pack: bool, shape: Shape, layout: int, codes: int, words: int, threads: int, /
) -> None: ...

class Tiles:
    def __init__(self, shape: Shape, codes: int, scale: int, zero: int, /) -> None: ...
    def code_bytes(self) -> int: ...
    def fill(self, isa: int, codes: int, scale: int, zero: int, threads: int, /) -> None: ...
    def read(self, isa: int, codes: int, scale: int, zero: int, threads: int, /) -> None: ...
    def gemm(
        self, isa: int, x: int, m: int, bias: int, bias_dtype: int, out: int, threads: int, /
    ) -> None: ...
    def gemm_grouped(
        self, isa: int, x: int, offsets: int, experts: int, out: int, threads: int, /
    ) -> None: ...
    def slab(self, isa: int, tile: int, end: int, out: int, threads: int, /) -> None: ...
