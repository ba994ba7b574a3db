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
    threads: int,
    shape: Shape,
    w: int,
    importance: int,
    factors: int,
    n_factors: int,
    amin: int,
    amax: int,
    /,
) -> None: ...
def qdq(isa: int, threads: int, shape: Shape, w: int, p: Params, out: int, /) -> None: ...
def qdq_step(
    isa: int,
    threads: int,
    shape: Shape,
    w: int,
    grad: int,
    grad_dtype: int,
    p: Params,
    lr_v: float,
    lr_range: float,
    /,
) -> None: ...
def quantize(
    isa: int,
    threads: int,
    shape: Shape,
    w: int,
    p: Params,
    codes: int,
    scale: int,
    zero: int,
    /,
) -> None: ...
def dequantize(
    isa: int, threads: int, shape: Shape, codes: int, scale: int, zero: int, out: int, /
) -> None: ...
def quantize_act(
    isa: int, threads: int, shape: Shape, x: int, codes: int, scale: int, given: bool, /
) -> None: ...
def repack(
    isa: int, pack: bool, shape: Shape, layout: int, codes: int, words: int, threads: int, /
) -> None: ...
def round(
    isa: int, threads: int, shape: Shape, w: int, words: int, scale: int, zero: int, /
) -> None: ...
def digest(isa: int, data: int, bytes: int, dtype: int, sums: int, /) -> bool: ...
def crc32_folds() -> bool: ...
def crc32(data: int, bytes: int, /) -> int: ...
def norm(
    isa: int,
    m: int,
    k: int,
    dtype: int,
    x: int,
    more: int,
    weight: int,
    eps: float,
    out: int,
    threads: int,
    /,
) -> None: ...
def gate(isa: int, m: int, n: int, dtype: int, x: int, out: int, threads: int, /) -> None: ...

class Attention:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        length: int,
        dtype: int,
        eps: float,
        scale: float,
        q_norm: int,
        k_norm: int,
        cos: int,
        sin: int,
        keys: int,
        values: int,
        /,
    ) -> None: ...
    def attend(
        self, isa: int, qkv: int, m: int, position: int, out: int, threads: int, /
    ) -> None: ...

class Tiles:
    def __init__(self, shape: Shape, codes: int, scale: int, zero: int, /) -> None: ...
    def code_bytes(self) -> int: ...
    def fill(self, isa: int, codes: int, scale: int, zero: int, threads: int, /) -> None: ...
    def read(self, isa: int, codes: int, scale: int, zero: int, threads: int, /) -> None: ...
    def gemm(
        self,
        isa: int,
        x: int,
        m: int,
        bias: int,
        bias_dtype: int,
        out: int,
        threads: int,
        way: int,
        /,
    ) -> None: ...
    def gemm_grouped(
        self, isa: int, x: int, offsets: int, experts: int, out: int, threads: int, way: int, /
    ) -> None: ...
